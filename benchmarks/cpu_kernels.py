"""The kernels that can serve a layer on this CPU, compared: the measurements behind `hunyuan_vllm/cpu_kernels.py`.

    python benchmarks/cpu_kernels.py
    python benchmarks/cpu_kernels.py --schemes int8 --rows 64 256 --layers gate_up

The layers of the benchmark model of 1.1 billion parameters, with cold weights: each call reads another copy, and the
copies are twice as large as the last-level caches. "upstream" is what vLLM chooses for bfloat16: oneDNN or torch, and
its portable experts. Each kernel is checked against a float32 product before it is timed. Ratios are
upstream's time over the kernel's: above 1, the kernel is faster. Attention is that of a decode step: a row is a
sequence, which has 384 tokens in the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
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
ATTENTION = {"attention 16/2": (16, 2), "attention 16/8": (16, 8)}  # query and key heads
CONTEXT, HEAD_SIZE, BLOCK = 384, 128, 128  # tokens of a sequence, dimensions of a head, tokens of a KV block
ROWS = (1, 8, 64, 256)
SCHEMES = ("bf16", "int8", "int8-w8a8", "fp8")
LEAST_COLD = 160 * 10**6  # bytes; a guest may be told of less cache than the host has
# bfloat16 rounds the result (2^-9) and, in experts, what is between the two products; int8 and E4M3 rows round more,
# the latter with a scale that is not calibrated.
TOLERANCE = {"bf16": 0.02, "int8": 0.03, "int8-w8a8": 0.05, "fp8": 0.2}
Multiply = Callable[..., "Tensor"]
"""(x, and for experts float32 weights and int32 ids `[rows, 1]`) → y"""


def cold_bytes() -> int:
    """Twice the last-level caches, each counted once."""
    caches: dict[int, dict[str, int]] = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        size, shared = (cache / "size").read_text().strip(), (cache / "shared_cpu_list").read_text()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}[size[-1]]
        caches.setdefault(int((cache / "level").read_text()), {})[shared] = unit * int(size[:-1])
    return max(LEAST_COLD, 2 * sum(caches[max(caches)].values())) if caches else LEAST_COLD


class Kernels:
    """Runs a layer's kernels; to be built in a `Child`."""

    def __init__(self, schemes: Sequence[str], rows: Sequence[int], rounds: int) -> None:
        import torch

        from hunyuan_vllm.native import operators

        if not operators.available():
            raise SystemExit("the C++ kernels are unavailable: see the log")
        self._schemes, self._rows, self._rounds = schemes, rows, rounds
        self._generator = torch.Generator().manual_seed(0)

    def linear(self, outputs: int, inputs: int) -> dict[int, dict[str, list[float]]]:
        """Seconds a call in each round, by rows and kernel. Weights are [outputs, inputs]."""
        weight = self._random(outputs, inputs)
        count = cold_bytes() // weight.nbytes + 1
        rings = self._rings([weight], count)
        measured = {}
        for rows in self._rows:
            x = self._random(rows, inputs, spread=1.0)
            _check(x.float() @ weight.float().t(), {name: ring[0](x) for name, ring in rings.items()})
            measured[rows] = self._time({name: [(call, x) for call in ring] for name, ring in rings.items()})
        return measured

    def experts(self) -> dict[int, dict[str, list[float]]]:
        """As `linear`. Rows go to experts in turn, so that a call reads as many as it can; the next call begins with
        the expert after."""
        import torch

        first, second = self._random(EXPERTS, 2 * INTERMEDIATE, HIDDEN), self._random(EXPERTS, HIDDEN, INTERMEDIATE)
        layers = cold_bytes() // (first.nbytes + second.nbytes) + 1
        rings = self._rings([first, second], layers)
        measured = {}
        for rows in self._rows:
            x = self._random(rows, HIDDEN, spread=1.0)
            gates = torch.rand(rows, 1, generator=self._generator)
            routes = [((torch.arange(rows) + start) % EXPERTS).int().unsqueeze(1) for start in range(EXPERTS)]
            expected = _expected_experts(x, first, second, gates, routes[0])
            _check(expected, {name: ring[0](x, gates, routes[0]) for name, ring in rings.items()})
            measured[rows] = self._time(
                {name: [(call, x, gates, ids) for call in ring for ids in routes] for name, ring in rings.items()}
            )
        return measured

    def attention(self, heads: int, key_heads: int) -> dict[int, dict[str, list[float]]]:
        """As `linear`; each call reads another cache."""
        import torch
        import vllm._custom_ops as ops

        from hunyuan_vllm.cpu_attention import VECTOR_LAYOUT

        scale, blocks, measured = HEAD_SIZE**-0.5, CONTEXT // BLOCK, {}
        for rows in self._rows:
            query = self._random(rows, heads, HEAD_SIZE, spread=1.0)
            keys, values = self._random(2, rows * CONTEXT, key_heads, HEAD_SIZE, spread=1.0)
            table = torch.randperm(rows * blocks, generator=self._generator, dtype=torch.int32).view(rows, blocks)
            slots = (table.long().unsqueeze(-1) * BLOCK + torch.arange(BLOCK)).flatten()
            lengths, starts = torch.full((rows,), CONTEXT, dtype=torch.int32), torch.arange(rows + 1, dtype=torch.int32)
            plan = ops.cpu_attn_get_scheduler_metadata(
                rows, heads, key_heads, HEAD_SIZE, lengths, query.dtype, starts, True, -1, VECTOR_LAYOUT, True
            )
            cache = torch.empty(rows * blocks, key_heads, BLOCK, 2 * HEAD_SIZE, dtype=query.dtype)
            halves = cache.view(-1, key_heads, 2 * BLOCK, HEAD_SIZE).chunk(2, dim=2)
            ops.cpu_attn_reshape_and_cache(keys, values, *halves, slots, VECTOR_LAYOUT)
            caches = [cache] + [cache.clone() for _ in range(cold_bytes() // cache.nbytes)]
            output = torch.empty_like(query)

            def upstream(
                cache: Tensor, query=query, output=output, table=table, lengths=lengths, given=(starts, plan)
            ) -> Tensor:
                halves = cache.view(-1, key_heads, 2 * BLOCK, HEAD_SIZE).chunk(2, dim=2)
                ops.cpu_attention_with_kv_cache(
                    query, *halves, output, given[0], lengths, scale, True, None, -1, table, 0.0, given[1], None
                )
                return output

            def ours(cache: Tensor, query=query, output=output, table=table, lengths=lengths) -> Tensor:
                torch.ops.hunyuan_vllm.decode_attention(output, query, cache, table, lengths, scale)
                return output

            grouped = query.view(rows, key_heads, -1, HEAD_SIZE).float()
            keys, values = (x.view(rows, CONTEXT, key_heads, HEAD_SIZE).float() for x in (keys, values))
            powers = (torch.einsum("rkgd,rtkd->rkgt", grouped, keys) * scale).softmax(-1)
            expected = torch.einsum("rkgt,rtkd->rkgd", powers, values).view(query.shape)
            calls = {"upstream": upstream, "bf16: ours": ours}
            for name, call in calls.items():
                _check(expected, {name: call(cache)})
            measured[rows] = self._time({name: [(call, cache) for cache in caches] for name, call in calls.items()})
        return measured

    def _rings(self, weights: list[Tensor], count: int) -> dict[str, list[Multiply]]:
        """`count` copies of each kernel that was asked for."""
        wanted = ("upstream", *self._schemes)
        makers = {name: make for name, make in kernels(weights).items() if name.split(":")[0] in wanted}
        return {name: [make() for _ in range(count)] for name, make in makers.items()}

    def _random(self, *shape: int, spread: float = 0.03) -> Tensor:
        import torch

        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, spread, generator=self._generator)

    def _time(self, calls: dict[str, list[tuple]]) -> dict[str, list[float]]:
        """Seconds a call, over passes through all copies."""

        def one_pass(ring: list[tuple]) -> float:
            begin = time.perf_counter()
            for call, *tensors in ring:
                call(*tensors)
            return (time.perf_counter() - begin) / len(ring)

        for ring in calls.values():
            one_pass(ring)
        turns = {name: lambda ring=ring: one_pass(ring) for name, ring in calls.items()}
        return interleaved(turns, self._rounds, notes=False)


def kernels(weights: Sequence[Tensor]) -> dict[str, Callable[[], Multiply]]:
    """By name, which begins with the scheme: what makes a kernel with a copy of the weights of its own.

    Args:
        weights: bfloat16, a linear layer's [out, in] or experts' [experts, out, in], first and second.
    """
    import torch
    import vllm._custom_ops as ops

    from hunyuan_vllm.cpu_kernels import CPU, Kernel, cpu
    from hunyuan_vllm.quant.cpu import w8a8, w8a16
    from hunyuan_vllm.quant.cpu_fp8 import fp8_experts, fp8_linear, prepare_fp8
    from hunyuan_vllm.quant.rounding import quantize_per_channel, quantize_per_tensor

    ours, here, is_linear = torch.ops.hunyuan_vllm, cpu(), len(weights) == 1
    outputs, isa = weights[0].shape[-2], "amx" if here is CPU.AMX else "vec"

    def quantised(quantise: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        if is_linear:
            values, scale = quantise(weights[0])
            return [values], [scale.flatten().expand(outputs).contiguous()]
        pairs = [[torch.stack(part) for part in zip(*map(quantise, weight), strict=True)] for weight in weights]
        return [values for values, _ in pairs], [scale.flatten(1) if scale.ndim > 1 else scale for _, scale in pairs]

    def maker(
        tensors: Sequence[Tensor], pack: Callable[[Tensor], Any], linear: Callable, experts: Callable
    ) -> Callable[[], Multiply]:
        return lambda: partial(linear if is_linear else experts, [pack(tensor) for tensor in tensors])

    def into(multiply: Callable[..., None]) -> Multiply:
        def call(own: list[Tensor], x: Tensor, *route: Tensor) -> Tensor:
            out = torch.empty_like(x)
            multiply(out, x, *own, *route)
            return out

        return call

    def amax_scale(x: Tensor) -> Tensor:
        return x.abs().max().float() / 448

    def pack_upstream(weight: Tensor) -> Any:
        if not is_linear:
            return ops.cpu_prepack_moe_weight(weight, isa)
        return weight.clone() if here is CPU.AVX2 else ops.create_onednn_mm(weight.t(), 32)

    makers = {
        "upstream": maker(
            weights,
            pack_upstream,
            (lambda own, x: torch.nn.functional.linear(x, own[0]))
            if here is CPU.AVX2
            else (lambda own, x: ops.onednn_mm(own[0], x, None)),
            into(
                lambda out, x, w13, w2, gates, ids: ops.cpu_fused_moe(
                    out, x, w13, w2, None, None, gates, ids, "silu", isa, False
                )
            ),
        )
    }
    makers["bf16: ours"] = maker(
        weights,
        lambda weight: ours.bf16_pack_experts(weight.view(-1, *weight.shape[-2:])),
        lambda own, x: ours.bf16_linear(x, own[0], None, outputs),
        lambda own, x, gates, ids: ours.bf16_experts(x, *own, gates, ids, INTERMEDIATE, None, None),
    )
    if here in (CPU.AVX512_BF16, CPU.AMX):
        unquantised = ops.CPUQuantMethod.UNQUANT
        makers["bf16: packed"] = maker(
            weights,
            lambda weight: torch.ops._C.convert_weight_packed(weight),
            lambda own, x: ops.weight_packed_linear_cpu(x, own[0], outputs, None),
            into(lambda *tensors: ops.fused_experts_cpu(*tensors, unquantised, *[None] * 5)),
        )
    levels, scales = quantised(quantize_per_channel)
    for name, expand_from in {"int8: ours": 0, "int8: expanded": 1}.items():
        makers[name] = maker(
            levels,
            lambda weight: w8a16.pack(weight, Kernel.OURS),
            lambda own, x, start=expand_from: ours.w8a16_linear(x, own[0], scales[0], None, start),
            lambda own, x, *route, start=expand_from: ours.w8a16_experts(x, *own, *scales, *route, *[None] * 4, start),
        )
    amx = [Kernel.AMX] if here is CPU.AMX else []
    for kernel in (Kernel.OURS, *amx):
        makers[f"int8-w8a8: {kernel}"] = maker(
            levels,
            lambda weight, kernel=kernel: w8a8.pack(weight, kernel),
            lambda own, x: w8a8.linear(x, own[0], scales[0]),
            lambda own, x, *route: w8a8.experts(x, *own, *scales, *route),
        )
    values, fp8_scales = quantised(quantize_per_tensor)
    for kernel in (Kernel.TORCH, *amx):
        makers[f"fp8: {kernel}"] = maker(
            values,
            lambda weight, stays=kernel is Kernel.AMX: prepare_fp8(weight, torch.bfloat16, stays),
            lambda own, x: fp8_linear(x, own[0], fp8_scales[0], amax_scale(x), None),
            lambda own, x, *route: fp8_experts(x, *own, *fp8_scales, amax_scale(x), amax_scale(x), None, None, *route),
        )
    return makers


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


def _check(expected: Tensor, results: dict[str, Tensor]) -> None:
    for name, result in results.items():
        error = ((result.float() - expected).norm() / expected.norm()).item()
        if not error < TOLERANCE.get(name.split(":")[0], TOLERANCE["bf16"]):
            raise ValueError(f"the kernel {name!r} is wrong: relative error {error:.3g}")


def main() -> None:
    parser = options(__doc__, rounds=4)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES[:3], help="default: all but fp8")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="default: %(default)s")
    layers = [*LINEARS, "experts", *ATTENTION]
    parser.add_argument("--layers", nargs="+", choices=layers, default=layers, help="default: all")
    arguments = parser.parse_args()
    report = Report("cpu_kernels", arguments)
    settings = (arguments.schemes, arguments.rows, arguments.rounds)
    with Child("kernels", Kernels, *settings, environ=engine_environ(arguments.threads)) as child:
        child.ready()
        for layer in arguments.layers:
            note(layer)
            if layer == "experts":
                title = f"Experts, top-1: {EXPERTS} x 3 x {INTERMEDIATE}x{HIDDEN}"
                measured = child.call("experts")
            elif layer in ATTENTION:
                title = f"Decode attention, query heads/key heads {layer.split()[-1]}, {CONTEXT} tokens in the cache"
                measured = child.call("attention", *ATTENTION[layer])
            else:
                title = f"Linear layer {layer}: {LINEARS[layer][0]}x{LINEARS[layer][1]}"
                measured = child.call("linear", *LINEARS[layer])
            for rows, times in measured.items():
                for name, seconds in times.items():
                    report.add(
                        title,
                        kernel=name,
                        rows=rows,
                        µs=Spread.of(1e6 * second for second in seconds),
                        ratio=ratios(times["upstream"], seconds),
                    )
    report.show()


if __name__ == "__main__":
    main()
