"""Which of vLLM's attention backends serves a set-up on a GPU: head size, cache type, shared sequences.

The rules are those of vLLM's `platforms/cuda.py` (order) and `v1/attention/backends/` (what each takes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["FLASHINFER_HEADS", "Backend", "Capable", "choose_backend", "refusals"]


FLASHINFER_HEADS = (64, 128, 256, 512)


class Capable(Protocol):
    """A kind of GPU, as far as backends look at it."""

    @property
    def capability(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Backend:
    """An attention backend of vLLM, by the name that --attention-backend takes."""

    name: str

    def refusal(self, gpu: Capable, head_dim: int, fp8_cache: bool, dcp: int) -> str | None:
        """Why it does not serve this; None if it does."""
        major = gpu.capability[0]
        if self.name == "FLASH_ATTN":
            if gpu.capability < (8, 0):
                return "needs compute capability 8.0"
            if head_dim % 8 or head_dim > 256:
                return f"has no head_dim {head_dim}"
            if fp8_cache and major not in (9, 10):
                return "reads an FP8 cache on compute capability 9 and 10 only"
            return None
        if self.name == "FLASHINFER":
            return None if head_dim in FLASHINFER_HEADS else f"has no head_dim {head_dim}"
        if dcp > 1:
            return "cannot share a sequence's cache between ranks"
        if self.name == "FLEX_ATTENTION":
            return "reads no FP8 cache" if fp8_cache else None
        if fp8_cache and gpu.capability < (8, 9):
            return "reads an FP8 cache from compute capability 8.9 on"
        return None if head_dim >= 32 else f"has no head_dim {head_dim}"


FLASH_ATTN, FLASHINFER, TRITON = Backend("FLASH_ATTN"), Backend("FLASHINFER"), Backend("TRITON_ATTN")
FLEX = Backend("FLEX_ATTENTION")


def _order(gpu: Capable) -> tuple[Backend, ...]:
    if gpu.capability[0] == 10:
        return FLASHINFER, FLASH_ATTN, TRITON, FLEX
    return FLASH_ATTN, FLASHINFER, TRITON, FLEX


def choose_backend(gpu: Capable, head_dim: int, fp8_cache: bool, dcp: int) -> Backend | None:
    """The backend that vLLM takes by itself; None where none serves this."""
    for backend in _order(gpu):
        if backend.refusal(gpu, head_dim, fp8_cache, dcp) is None:
            return backend
    return None


def refusals(gpu: Capable, head_dim: int, fp8_cache: bool, dcp: int) -> list[tuple[str, str]]:
    """(backend, why not) of those that vLLM tries first and that refuse."""
    found = []
    for backend in _order(gpu):
        why = backend.refusal(gpu, head_dim, fp8_cache, dcp)
        if why is None:
            break
        found.append((backend.name, why))
    return found
