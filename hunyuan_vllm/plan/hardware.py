"""GPUs, and the attention backend that vLLM chooses on them"""

import json
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.text import GIB

DATA = Path(__file__).parent / "data" / "gpus.json"


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
        try:
            return Gpu.model_validate_json(Path(name).expanduser().read_text())
        except OSError as error:
            raise UserError(f"--gpu {name} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(f"--gpu {name}: {where}: {first['msg']} (--list-gpus shows the fields)") from None
    for gpu in known_gpus():
        if name.upper() in (known.upper() for known in (gpu.name, *gpu.aliases)):
            return gpu
    raise UserError(
        f"--gpu {name} is not known: use one of {', '.join(gpu.name for gpu in known_gpus())}, or a JSON file "
        "(--list-gpus shows the table and the fields)"
    )


FLASHINFER_HEADS = (64, 128, 256, 512)


def backend_refusal(name: str, capability: tuple[int, int], head_dim: int, fp8_cache: bool, dcp: int) -> str | None:
    """Why the attention backend of this name (as --attention-backend takes it) cannot run this; None if it can."""
    if name == "FLASH_ATTN":
        if capability < (8, 0):
            return "needs compute capability 8.0"
        if head_dim % 8 or head_dim > 256:
            return f"does not support head_dim {head_dim}"
        if fp8_cache and capability[0] not in (9, 10):
            return "needs compute capability 9 or 10 for an FP8 cache"
        return None
    if name == "FLASHINFER":
        return None if head_dim in FLASHINFER_HEADS else f"does not support head_dim {head_dim}"
    if dcp > 1:
        return "cannot share a sequence's cache between ranks"
    if name == "FLEX_ATTENTION":
        return "cannot read an FP8 cache" if fp8_cache else None
    if fp8_cache and capability < (8, 9):
        return "needs compute capability 8.9 for an FP8 cache"
    return None if head_dim >= 32 else f"does not support head_dim {head_dim}"


def choose_backend(
    capability: tuple[int, int], head_dim: int, fp8_cache: bool, dcp: int
) -> tuple[str | None, dict[str, str]]:
    """The backend that vLLM chooses by default, None where none can run this; and why not those it tries before."""
    first = ("FLASHINFER", "FLASH_ATTN") if capability[0] == 10 else ("FLASH_ATTN", "FLASHINFER")
    refused: dict[str, str] = {}
    for name in (*first, "TRITON_ATTN", "FLEX_ATTENTION"):
        why = backend_refusal(name, capability, head_dim, fp8_cache, dcp)
        if why is None:
            return name, refused
        refused[name] = why
    return None, refused
