"""Which kernel multiplies which weights on which CPU: the one table. A layer asks it once, when it is built or loaded.

Ratios are of speed. What was measured before a release or on another machine says so; no row was measured on AMX with
this version. The programs are in `benchmarks/`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from vllm.logger import init_logger

from hunyuan_vllm.native import operators
from hunyuan_vllm.native.build import has_avx512
from hunyuan_vllm.quant.schemes import BF16, FP8, INT8, INT8_W8A8, Scheme

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name

LINEAR, EXPERTS, ATTENTION = "linear", "experts", "attention"
TILE = 32  # inputs and outputs that AMX's kernels take at a time
BLOCK_K = 128  # inputs that have one scale in vLLM's FP8 kernels
TEST_ROWS = 37  # more than a tile of them
AGREEMENT = 0.02  # relative; kernels that round alike differ by less than 0.006, one that misreads its weights by 1


class CPU(StrEnum):
    AMX = "AMX"
    AVX512_BF16 = "AVX-512 BF16"
    AVX512 = "AVX-512 without BF16"
    AVX2 = "AVX2"
    OTHER = "another CPU"


class Kernel(StrEnum):
    OURS = "ours"  # native/
    AMX = "vLLM's for AMX"  # weights in their own type; checked against ours before it is used
    PACKED = "vLLM's packed"  # bfloat16; vLLM keeps them to AMX
    UPSTREAM = "vLLM's choice"
    TORCH = "plain torch"  # defines what the others compute


@dataclass(frozen=True)
class Row:
    scheme: Scheme
    layers: tuple[str, ...]
    cpus: tuple[CPU, ...]
    kernel: Kernel
    measured: str
    expand_from: int = 0
    """Rows (of an expert: on average) from which our kernel expands weights for torch's product; 0: never."""


BOTH = (LINEAR, EXPERTS)
X86 = (CPU.AMX, CPU.AVX512_BF16, CPU.AVX512, CPU.AVX2)

# The first row that is possible here and fits the layer. Shapes that AMX's kernels do not take fall to the next row.
TABLE = (
    Row(
        BF16, (LINEAR,), (CPU.AMX,), Kernel.UPSTREAM,
        "cpu_kernels.py, an earlier version: oneDNN 1.4–2.5 times packed from 64 rows, 0.84–0.95 up to 8",
    ),
    Row(
        BF16, (EXPERTS,), (CPU.AMX,), Kernel.UPSTREAM,
        "cpu_kernels.py, an earlier version: vLLM's AMX experts 1.2–1.5 times packed",
    ),
    Row(
        BF16, (LINEAR,), (CPU.AVX512_BF16,), Kernel.OURS,
        "cpu_kernels.py, on Zen 5: 1.05–1.3 times oneDNN up to 16 rows, 1.0–1.07 from 64; packed 0.85–1.3, 0.9–0.98",
    ),
    Row(
        BF16, (EXPERTS,), (CPU.AVX512_BF16,), Kernel.PACKED,
        "cpu_kernels.py, on Zen 5: 1.5–1.85 times the portable up to 8 rows, 1.2–1.7 from 16; ours 1.2–1.7, 1.4–1.9",
    ),
    Row(
        BF16, BOTH, (CPU.AVX2,), Kernel.OURS,
        "cpu_kernels.py: linear layers 1.4–1.8 times torch at 1 row, 4–7 from 8; experts 1.0–1.4",
    ),
    Row(
        BF16, (ATTENTION,), (CPU.AVX512_BF16, CPU.AVX2), Kernel.OURS,
        "cpu_kernels.py, steps that only decode: 2.2–3.1 times vLLM's vector kernel on Zen 5, 1.3–2.0 on Zen 4; both "
        "for AVX2 on Zen 5, by hand: 1.3–1.7",
    ),
    Row(
        INT8_W8A8, BOTH, (CPU.AMX,), Kernel.AMX,
        "by hand, an earlier version: linear layers 1.25–2.5 times ours, experts 1.4–2.3; no shared expert joins these",
    ),
    Row(
        INT8_W8A8, BOTH, X86, Kernel.OURS,
        "int8_decode.py, on AVX-512 BF16; on AVX2, cpu_kernels.py: 1.6–1.9 times BF16, experts 1.6–2.0",
    ),
    Row(
        INT8, BOTH, (CPU.AMX,), Kernel.OURS,
        "by hand, an earlier version, not expanded: 1 row 1.4 times BF16, 8 rows 0.9, 64 rows 0.18 (190 µs a row)",
        expand_from=32,
    ),
    Row(
        INT8, BOTH, X86, Kernel.OURS,
        "int8_decode.py, on AVX-512 BF16; on AVX2, cpu_kernels.py: 2.0, 1.4, 1.0 times BF16 at 1, 8, 64 rows, expanded "
        "0.4, 0.4, 0.5; experts 1.8, 1.9, 1.4",
    ),
    Row(
        FP8, BOTH, (CPU.AMX,), Kernel.AMX,
        "by hand, an earlier version: linear layers 1.6–2.5 times weights that are expanded once",
    ),
    Row(FP8, BOTH, (CPU.AVX512_BF16,), Kernel.PACKED, "not measured: FP8 is for checking there"),
)  # fmt: skip


def cpu() -> CPU:
    """This machine's, as torch reports it: AMX counts where Linux lets the process use it."""
    if not torch.cpu._is_avx512_supported():
        return CPU.AVX2 if torch.cpu._is_avx2_supported() else CPU.OTHER
    if not torch.cpu._is_avx512_bf16_supported():
        return CPU.AVX512
    return CPU.AMX if torch.cpu._is_amx_tile_supported() else CPU.AVX512_BF16


def choices(scheme: Scheme, layer: str) -> Iterable[Row]:
    """What can serve such layers on this machine, best first. The last is vLLM's choice or plain torch."""
    here = cpu()
    for row in TABLE:
        if row.scheme is scheme and layer in row.layers and here in row.cpus:
            if row.kernel is not Kernel.OURS or _are_ours_there(row, here):
                yield row
    yield Row(scheme, (layer,), (here,), Kernel.UPSTREAM if scheme is BF16 else Kernel.TORCH, "")


def _are_ours_there(row: Row, here: CPU) -> bool:
    if row.scheme is BF16 and here is CPU.AVX512_BF16 and not has_avx512():
        return False  # a CPU without all that our AVX-512 kernels need gets those for AVX2
    return operators.available()


def kernel(scheme: Scheme, layer: str) -> Kernel:
    """The best one, whatever the layer's shape."""
    return next(iter(choices(scheme, layer))).kernel


def agrees(name: str, rows: Tensor, theirs: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor]) -> bool:
    """Whether a kernel computes what it should of these rows, and of the first alone, on a small random layer. Where
    not, the log names it."""
    try:
        for x in (rows, rows[:1]):
            result, wanted = theirs(x).double(), expected(x).double()
            difference = ((result - wanted).norm() / wanted.norm()).item()
            if not difference < AGREEMENT:
                raise ArithmeticError(f"it differs from ours by {difference:.2g} of the result")
    except Exception as error:  # whatever it is, there is another kernel
        reason = str(error).strip().partition("\n")[0]
        logger.warning("%s is not used: %s", name, reason or type(error).__name__)
        return False
    return True


# The small layers that `agrees` is asked about


def small_size(size: int) -> int:
    """A size for a test, which ends as `size` does."""
    return 2 * BLOCK_K + size % BLOCK_K


def random_rows(inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(inputs)
    return torch.randn(TEST_ROWS, inputs, generator=generator, dtype=torch.bfloat16)


def int8_values(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))


def distinct_scales(*shape: int) -> Tensor:
    """Which all differ; models load with another default type than float32."""
    return torch.linspace(1e-3, 2e-3, math.prod(shape), dtype=torch.float32).view(shape)


def small_routes(rows: int) -> tuple[Tensor, Tensor]:
    """Of two experts of three: weights and ids; the last expert has one row."""
    ids = torch.zeros(rows, 1, dtype=torch.int32)
    ids[-1] = 2
    return 100 * distinct_scales(rows, 1), ids
