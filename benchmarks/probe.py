"""The limits that speed is compared with: what this machine can read and compute, and what a step has to read."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

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


@dataclass(frozen=True)
class Weights:
    """Bytes of the checkpoint by how often a step reads them."""

    always: float
    """Attention, norms, routers, shared MLPs and the head (the embedding, where they are tied)."""
    expert: float
    """One expert in every layer."""
    head: float

    @classmethod
    def of(cls, model: Path, projections: int = 2) -> Weights:
        """Of a bfloat16 checkpoint; or as the engine holds it, with so many bytes a value of a projection."""
        sizes: dict[str, float] = {}
        for file in model.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                sizes |= {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}
        sizes |= {name: size * projections / 2 for name, size in sizes.items() if name.endswith("_proj.weight")}
        embedding = sizes.pop("model.embed_tokens.weight")
        head = sizes.setdefault("lm_head.weight", embedding)
        routed = {name: size for name, size in sizes.items() if ".experts." in name}
        experts = {name.split(".experts.")[1].split(".")[0] for name in routed}
        routed_bytes = sum(routed.values())
        return cls(sum(sizes.values()) - routed_bytes, routed_bytes / max(len(experts), 1), head)

    def of_step(self, distinct_experts: float) -> float:
        """Bytes a decode step reads when it hits that many experts a layer."""
        return self.always + distinct_experts * self.expert

    def prompt_flops(self, topk: int) -> float:
        """Multiplications and additions for one token of a prompt: two for each bfloat16 weight but the head's."""
        return self.always + topk * self.expert - self.head
