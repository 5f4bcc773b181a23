"""GPUs, and the attention backend that vLLM chooses on them"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from hunyuan_vllm.util.errors import UserError

DATA = Path(__file__).parent / "data" / "gpus.json"
GIB = 2**30


class Gpu(BaseModel):
    """One kind of GPU. Rates are dense peaks, in units of 10¹² operations a second; None where it has no such units.

    Attributes:
        memory_gib: total memory as CUDA reports it: what vLLM takes its share of.
        memory_gb: the memory it is sold with.
        link_gbs: GB/s to the other GPUs of its node, both directions together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    capability: tuple[int, int]
    memory_gib: PositiveFloat
    memory_gb: PositiveFloat
    bandwidth_gbs: PositiveFloat
    bf16_tflops: PositiveFloat | None
    fp8_tflops: PositiveFloat | None = None
    int8_tops: PositiveFloat | None = None
    link_gbs: PositiveFloat
    link: str = "custom"
    aliases: tuple[str, ...] = ()
    sources: tuple[str, ...] = Field(min_length=1)

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.memory_gib * GIB)

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bandwidth_gbs * 1e9

    @property
    def link_one_way(self) -> float:
        """Bytes a second that it can send to its node while it receives as many."""
        return self.link_gbs * 1e9 / 2


@cache
def known_gpus() -> tuple[Gpu, ...]:
    return tuple(Gpu.model_validate(entry) for entry in json.loads(DATA.read_text())["gpus"])


def find_gpu(name: str) -> Gpu:
    """The GPU of this name or alias in any case, or of a JSON file like an entry of `data/gpus.json`."""
    if name.endswith(".json"):
        return _read(Path(name).expanduser())
    for gpu in known_gpus():
        if name.upper() in (known.upper() for known in (gpu.name, *gpu.aliases)):
            return gpu
    raise UserError(
        f"--gpu {name} is not in the table: use one of {', '.join(gpu.name for gpu in known_gpus())}, or a JSON file "
        "(--list-gpus shows the table and the fields)"
    )


def _read(path: Path) -> Gpu:
    try:
        return Gpu.model_validate_json(path.read_text())
    except OSError as error:
        raise UserError(f"--gpu {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"--gpu {path}: {where}: {first['msg']} (--list-gpus shows the fields)") from None


FLASHINFER_HEADS = (64, 128, 256, 512)


class Capable(Protocol):
    """A kind of GPU, as far as backends depend on it."""

    @property
    def capability(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Backend:
    """An attention backend of vLLM, by the name that --attention-backend takes."""

    name: str

    def refusal(self, gpu: Capable, head_dim: int, fp8_cache: bool, dcp: int) -> str | None:
        """Why it cannot run this; None if it can."""
        major = gpu.capability[0]
        if self.name == "FLASH_ATTN":
            if gpu.capability < (8, 0):
                return "needs compute capability 8.0"
            if head_dim % 8 or head_dim > 256:
                return f"does not support head_dim {head_dim}"
            if fp8_cache and major not in (9, 10):
                return "needs compute capability 9 or 10 for an FP8 cache"
            return None
        if self.name == "FLASHINFER":
            return None if head_dim in FLASHINFER_HEADS else f"does not support head_dim {head_dim}"
        if dcp > 1:
            return "cannot share a sequence's cache between ranks"
        if self.name == "FLEX_ATTENTION":
            return "cannot read an FP8 cache" if fp8_cache else None
        if fp8_cache and gpu.capability < (8, 9):
            return "needs compute capability 8.9 for an FP8 cache"
        return None if head_dim >= 32 else f"does not support head_dim {head_dim}"


FLASH_ATTN, FLASHINFER, TRITON = Backend("FLASH_ATTN"), Backend("FLASHINFER"), Backend("TRITON_ATTN")
FLEX = Backend("FLEX_ATTENTION")


def _order(gpu: Capable) -> tuple[Backend, ...]:
    if gpu.capability[0] == 10:
        return FLASHINFER, FLASH_ATTN, TRITON, FLEX
    return FLASH_ATTN, FLASHINFER, TRITON, FLEX


def choose_backend(gpu: Capable, head_dim: int, fp8_cache: bool, dcp: int) -> Backend | None:
    """The backend that vLLM chooses by default; None where none can run this."""
    usable = (backend for backend in _order(gpu) if backend.refusal(gpu, head_dim, fp8_cache, dcp) is None)
    return next(usable, None)


def refusals(gpu: Capable, head_dim: int, fp8_cache: bool, dcp: int) -> list[tuple[str, str]]:
    """(backend, why not) of those that vLLM tries before the one that it chooses."""
    found = []
    for backend in _order(gpu):
        why = backend.refusal(gpu, head_dim, fp8_cache, dcp)
        if why is None:
            break
        found.append((backend.name, why))
    return found
