"""The bfloat16 kernels in use on this CPU against vLLM's choice: linear layers of oneDNN or torch, portable experts.

    python benchmarks/cpu_kernels.py

In use are vLLM's packed kernels on CPUs with AVX-512 BF16, and ours on those with AVX2 alone. The layer shapes of the
1.1-billion-parameter benchmark model, with weights that are cold: each call reads another copy, out of more than the
caches hold. Both kernels of a pair are checked against a float32 product before they are timed. The ratio is the stock
kernel's time over the packed one's: above 1, packed is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Report, Spread, interleaved, note, options, ratios
from processes import Child, engine_environ

if TYPE_CHECKING:
    from torch import Tensor

LINEARS = {
    "qkv": (1600, 1280),
    "q, o": (1280, 1280),
    "gate_up": (4096, 1280),
    "down": (1280, 2048),
    "head": (8192, 1280),
}
EXPERTS, INTERMEDIATE, HIDDEN = 16, 2048, 1280
ROWS = (1, 8, 64, 256)
L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
COLD_BYTES = max(160 * 10**6, 2 * 1024 * int(L3.read_text().strip().rstrip("K"))) if L3.exists() else 640 * 10**6
EXPERT_LAYERS = 2
# bfloat16 rounds the result (2^-9) and, in experts, what is between the two products.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Measured:
    """Seconds a call in each round, and the bytes of weights a call reads on average."""

    stock: list[float]
    packed: list[float]
    weight_bytes: float


class Kernels:
    """Runs both kernels of a pair; to be built in a `Child`."""

    def __init__(self) -> None:
        import torch

        self._generator = torch.Generator().manual_seed(0)

    def linear(self, outputs: int, inputs: int, rounds: int) -> dict[int, Measured]:
        """By rows. Weights are [outputs, inputs], rows [rows, inputs]."""
        import torch
        import vllm._custom_ops as ops

        from hunyuan_vllm.native import operators

        ours = operators.multiplies_bf16()
        weights = [self._random(outputs, inputs) for _ in range(COLD_BYTES // (2 * outputs * inputs) + 1)]
        if ours:
            packed = [torch.ops.hunyuan_vllm.bf16_pack_experts(weight.unsqueeze(0))[0] for weight in weights]
        else:
            packed = [torch.ops._C.convert_weight_packed(weight) for weight in weights]
            handlers = [ops.create_onednn_mm(weight.t(), 32) for weight in weights]
        measured = {}
        for rows in ROWS:
            x = self._random(rows, inputs, spread=1.0)

            def stock(index: int, x: Tensor = x) -> Tensor:
                return (
                    torch.nn.functional.linear(x, weights[index]) if ours else ops.onednn_mm(handlers[index], x, None)
                )

            def packed_linear(index: int, x: Tensor = x) -> Tensor:
                if ours:
                    return torch.ops.hunyuan_vllm.bf16_linear(x, packed[index], None, outputs)
                return ops.weight_packed_linear_cpu(x, packed[index], outputs, None)

            _check(x.float() @ weights[0].float().t(), [stock(0), packed_linear(0)])
            measured[rows] = _time([stock, packed_linear], len(weights), rounds, weights[0].nbytes)
        return measured

    def experts(self, rounds: int) -> dict[int, Measured]:
        """By rows. Rows go to experts in turn, so that a call reads as many as it can; the next call begins with the
        expert after."""
        import torch
        import vllm._custom_ops as ops

        from hunyuan_vllm.native import operators

        ours = operators.multiplies_bf16()
        pack = torch.ops.hunyuan_vllm.bf16_pack_experts if ours else torch.ops._C.convert_weight_packed
        first, second = self._random(EXPERTS, 2 * INTERMEDIATE, HIDDEN), self._random(EXPERTS, HIDDEN, INTERMEDIATE)
        stock, packed = [], []
        for _ in range(EXPERT_LAYERS):
            stock.append([ops.cpu_prepack_moe_weight(weight, "vec") for weight in (first, second)])
            packed.append([pack(weight) for weight in (first, second)])
        measured = {}
        for rows in ROWS:
            x = self._random(rows, HIDDEN, spread=1.0)
            gates = torch.rand(rows, 1, generator=self._generator)
            routes = [
                ((torch.arange(rows) + start) % EXPERTS).to(torch.int32).unsqueeze(1)
                for start in range(0, EXPERTS * EXPERT_LAYERS)
            ]

            def portable(index: int, x: Tensor = x, gates: Tensor = gates, routes: Any = routes) -> Tensor:
                w1, w2 = stock[index // EXPERTS]
                out = torch.empty_like(x)
                ops.cpu_fused_moe(out, x, w1, w2, None, None, gates, routes[index], "silu", "vec", False)
                return out

            def fused(index: int, x: Tensor = x, gates: Tensor = gates, routes: Any = routes) -> Tensor:
                w1, w2 = packed[index // EXPERTS]
                if ours:
                    ids = routes[index]
                    return torch.ops.hunyuan_vllm.bf16_experts(x, w1, w2, gates, ids, INTERMEDIATE, None, None)
                out, kind = torch.empty_like(x), ops.CPUQuantMethod.UNQUANT
                ops.fused_experts_cpu(out, x, w1, w2, gates, routes[index], kind, *[None] * 5)
                return out

            _check(_expected_experts(x, first, second, gates, routes[0]), [portable(0), fused(0)])
            read = min(rows, EXPERTS) * (first[0].nbytes + second[0].nbytes)
            measured[rows] = _time([portable, fused], len(routes), rounds, read)
        return measured

    def _random(self, *shape: int, spread: float = 0.03) -> Tensor:
        import torch

        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, spread, generator=self._generator)


def _expected_experts(x: Tensor, first: Tensor, second: Tensor, gates: Tensor, routes: Tensor) -> Tensor:
    """down(silu(gate(x)) · up(x)) of each row's expert in float32, weighted; [rows, hidden]."""
    import torch

    expected = torch.empty(x.shape)
    for expert in routes.unique().tolist():
        rows = routes[:, 0] == expert
        gate, up = (x[rows].float() @ first[expert].float().t()).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        expected[rows] = gates[rows] * (hidden @ second[expert].float().t())
    return expected


def _check(expected: Tensor, results: Sequence[Tensor]) -> None:
    for name, result in zip(("stock", "packed"), results, strict=True):
        error = ((result.float() - expected).norm() / expected.norm()).item()
        if not error < TOLERANCE:
            raise ValueError(f"the {name} kernel is wrong: relative error {error:.3g}")


def _time(kernels: Sequence[Callable[[int], Tensor]], count: int, rounds: int, weight_bytes: float) -> Measured:
    """Seconds a call, over passes through all `count` copies."""

    def one_pass(kernel: Callable[[int], Tensor]) -> float:
        begin = time.perf_counter()
        for index in range(count):
            kernel(index)
        return (time.perf_counter() - begin) / count

    for kernel in kernels:
        one_pass(kernel)
    stock, packed = kernels
    turns = {"stock": lambda: one_pass(stock), "packed": lambda: one_pass(packed)}
    return Measured(**interleaved(turns, rounds, notes=False), weight_bytes=weight_bytes)


def main() -> None:
    arguments = options(__doc__, rounds=6).parse_args()
    report = Report("cpu_kernels", arguments)
    with Child("kernels", Kernels, environ=engine_environ(arguments.threads)) as kernels:
        kernels.ready()
        for name, shape in LINEARS.items():
            note(f"linear {name}, {shape[0]} x {shape[1]}")
            measured = kernels.call("linear", *shape, arguments.rounds)
            _tabulate(
                report,
                "Linear layers: vLLM's choice against the packed kernel",
                f"{name} {shape[0]}x{shape[1]}",
                measured,
            )
        note(f"{EXPERTS} experts, top-1")
        name = f"{EXPERTS} x 3 x {INTERMEDIATE}x{HIDDEN}"
        _tabulate(report, "Experts, top-1: portable against packed", name, kernels.call("experts", arguments.rounds))
    report.show()


def _tabulate(report: Report, table: str, name: str, measured: dict[int, Measured]) -> None:
    for rows, times in measured.items():
        report.add(
            table,
            weights=name,
            rows=rows,
            stock_µs=Spread.of(1e6 * seconds for seconds in times.stock),
            stock_GB_s=Spread.of(times.weight_bytes / seconds / 1e9 for seconds in times.stock),
            packed_µs=Spread.of(1e6 * seconds for seconds in times.packed),
            packed_GB_s=Spread.of(times.weight_bytes / seconds / 1e9 for seconds in times.packed),
            ratio=ratios(times.stock, times.packed),
        )


if __name__ == "__main__":
    main()
