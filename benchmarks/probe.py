"""What this machine can do at best, with as many threads as the engine has: bytes read and multiply-adds a second."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Probe"]

MIB = 2**20
BUFFER = 512 * MIB
GEMV = (4096, 1280)  # the shared MLP's first weight in the benchmarks' model
GEMM = (2048, 4096, 4096)


class Probe:
    """Best rates over a few passes each, to be built in a `Child`.

    Reading: summing a buffer in huge pages, summing one in ordinary pages, and multiplying one bfloat16 row with a
    stream of weights in this CPU's packed kernel; all far larger than the caches. The bound is the fastest of them.
    Multiplying: torch's bfloat16 matrix product of a prefill's size.
    """

    def __init__(self) -> None:
        import vllm._custom_ops as ops  # registers torch.ops._C

        from hunyuan_vllm.cpu_kernels import LINEAR, Kernel, kernel
        from hunyuan_vllm.quant.schemes import BF16

        pages = mmap.mmap(-1, BUFFER)
        pages.madvise(mmap.MADV_HUGEPAGE)
        self._huge = torch.frombuffer(pages, dtype=torch.float32).fill_(1)
        self._plain = torch.ones(BUFFER // 4)
        outputs, inputs = GEMV
        weights = [torch.randn(GEMV, dtype=torch.bfloat16) for _ in range(24)]
        self._row = torch.randn(1, inputs, dtype=torch.bfloat16)
        self._multiply: Callable[[Tensor], Tensor]
        if kernel(BF16, LINEAR) is Kernel.OURS:
            self._weights = [torch.ops.hunyuan_vllm.bf16_pack_experts(weight.unsqueeze(0))[0] for weight in weights]
            self._multiply = lambda packed: torch.ops.hunyuan_vllm.bf16_linear(self._row, packed, None, outputs)
        else:
            self._weights = [torch.ops._C.convert_weight_packed(weight) for weight in weights]
            self._multiply = lambda packed: ops.weight_packed_linear_cpu(self._row, packed, outputs, None)
        rows, inner, columns = GEMM
        self._left = torch.randn(rows, inner, dtype=torch.bfloat16)
        self._right = torch.randn(columns, inner, dtype=torch.bfloat16)
        self.read(), self.multiply()

    def read(self) -> dict[str, float]:
        """Bytes a second of each way of reading."""
        return {
            "sum, huge pages": BUFFER / _least_seconds(self._huge.sum),
            "sum, ordinary pages": BUFFER / _least_seconds(self._plain.sum),
            "packed bfloat16 products": sum(weight.nbytes for weight in self._weights) / _least_seconds(self._products),
        }

    def multiply(self) -> float:
        """Floating-point operations a second."""
        rows, inner, columns = GEMM
        seconds = _least_seconds(lambda: torch.nn.functional.linear(self._left, self._right))
        return 2 * rows * inner * columns / seconds

    def _products(self) -> None:
        for weight in self._weights:
            self._multiply(weight)


def _least_seconds(run: Callable[[], object], passes: int = 5) -> float:
    seconds = []
    for _ in range(passes):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
