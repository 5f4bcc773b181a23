"""Int8 products on CPUs against float64 ones of the same weights, for both schemes, packed and portable."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from hunyuan_vllm import cpu_kernels
from hunyuan_vllm.cpu_kernels import EXPERTS, LINEAR
from hunyuan_vllm.native import operators
from hunyuan_vllm.quant.cpu import Int8Kernels, w8a8, w8a16

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
ROWS = (1, 2, 3, 7, 16, 65, 300)
# Relative errors. bfloat16 rounds a result by up to 2^-9, and experts' inner values; int8 rows are rounded to 1/127 of
# their greatest value, of which a normal distribution's is three to four times the mean.
LINEAR_ERRORS = {(w8a16, torch.bfloat16): 3e-3, (w8a16, torch.float32): 1e-6, (w8a8, torch.bfloat16): 1.5e-2}
EXPERT_ERRORS = {(w8a16, torch.bfloat16): 6e-3, (w8a16, torch.float32): 2e-6, (w8a8, torch.bfloat16): 3e-2}


@pytest.fixture(params=["w8a16", "w8a16 expanded", "w8a8"])
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Int8Kernels:
    """With two rows the weights are expanded already, or never."""
    expand_from = 2 if "expanded" in request.param else 0
    table = tuple(replace(row, expand_from=expand_from) for row in cpu_kernels.TABLE)
    monkeypatch.setattr(cpu_kernels, "TABLE", table)
    if expand_from and operators.available():
        for layer in (LINEAR, EXPERTS):
            w8a16.choose(layer, torch.bfloat16, 64, 64)
            assert w8a16.expand_from[layer] == expand_from
    return w8a8 if request.param == "w8a8" else w8a16


def tolerance(table: dict, scheme: Int8Kernels, dtype: torch.dtype) -> float:
    return table.get((scheme, dtype), table[scheme, torch.bfloat16])


def weights(generator: torch.Generator, *shape: int) -> tuple[Tensor, Tensor]:
    """int8, extreme values among them, and scales, all of which differ."""
    levels = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    levels.view(-1)[:2] = torch.tensor([-127, 127], dtype=torch.int8)
    scale = 0.001 * torch.linspace(0.5, 2, math.prod(shape[:-1])).view(shape[:-1])
    return levels, scale


def pack(scheme: Int8Kernels, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return scheme.pack(weight, scheme.choose(LINEAR, dtype, *weight.shape))


def pack_experts(scheme: Int8Kernels, w13: Tensor, w2: Tensor, dtype: torch.dtype) -> list[Tensor]:
    kernel = scheme.choose(EXPERTS, dtype, *w2.shape[1:])
    return [scheme.pack(weight, kernel) for weight in (w13, w2)]


def expanded(levels: Tensor, scale: Tensor) -> Tensor:
    return levels.double() * scale.double().unsqueeze(-1)


def error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


@DTYPES
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 128), (100, 70), (33, 31), (256, 192)])
def test_linear(scheme: Int8Kernels, dtype: torch.dtype, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    levels, scale = weights(generator, outputs, inputs)
    packed = pack(scheme, levels, dtype)
    bias = torch.randn(outputs, generator=generator)
    for rows in ROWS:
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        expected = x.double() @ expanded(levels, scale).t()
        for given in (None, bias):
            result = scheme.linear(x, packed, scale, given)
            assert result.shape == (rows, outputs) and result.dtype == dtype and result.is_contiguous()
            wanted = expected if given is None else expected + given.double()
            assert error(result, wanted) < tolerance(LINEAR_ERRORS, scheme, dtype), rows


@DTYPES
@pytest.mark.parametrize(("hidden", "width"), [(64, 48), (128, 96), (66, 25), (192, 128)])
@pytest.mark.parametrize("topk", [1, 2])
def test_experts(scheme: Int8Kernels, dtype: torch.dtype, hidden: int, width: int, topk: int) -> None:
    generator = torch.Generator().manual_seed(hidden)
    (w13, w13_scale), (w2, w2_scale) = weights(generator, 5, 2 * width, hidden), weights(generator, 5, hidden, width)
    packed = pack_experts(scheme, w13, w2, dtype)
    for rows in ROWS:
        x = torch.randn(rows, hidden, generator=generator).to(dtype)
        topk_weights = torch.rand(rows, topk, generator=generator)
        for topk_ids in routes(rows, topk, generator):
            result = scheme.experts(x, *packed, w13_scale, w2_scale, topk_weights, topk_ids)
            assert result.shape == (rows, hidden) and result.dtype == dtype
            first, second = expanded(w13, w13_scale), expanded(w2, w2_scale)
            expected = expected_experts(x, first, second, topk_weights, topk_ids)
            assert error(result, expected) < tolerance(EXPERT_ERRORS, scheme, dtype), (rows, topk_ids.unique().tolist())


@pytest.mark.skipif(not operators.available(), reason="needs a CPU and a compiler for the C++ kernels")
@pytest.mark.parametrize("topk", [1, 2])
def test_a_shared_expert_is_added(scheme: Int8Kernels, topk: int) -> None:
    generator = torch.Generator().manual_seed(topk)
    hidden, width, dtype = 66, 25, torch.bfloat16
    (w13, w13_scale), (w2, w2_scale) = weights(generator, 5, 2 * width, hidden), weights(generator, 5, hidden, width)
    (s13, s13_scale), (s2, s2_scale) = weights(generator, 2 * width, hidden), weights(generator, hidden, width)
    packed = pack_experts(scheme, w13, w2, dtype)
    shared = pack(scheme, s13, dtype), pack(scheme, s2, dtype), s13_scale, s2_scale
    for rows in (0, *ROWS):
        x = torch.randn(rows, hidden, generator=generator).to(dtype)
        topk_weights = torch.rand(rows, topk, generator=generator)
        gate, up = (x.double() @ expanded(s13, s13_scale).t()).chunk(2, dim=-1)
        own = (silu(gate) * up) @ expanded(s2, s2_scale).t()
        for topk_ids in routes(rows, topk, generator) if rows else [torch.zeros(0, topk, dtype=torch.int32)]:
            result = scheme.experts(x, *packed, w13_scale, w2_scale, topk_weights, topk_ids, shared)
            routed = (expanded(w13, w13_scale), expanded(w2, w2_scale), topk_weights, topk_ids)
            assert rows == 0 or error(result, expected_experts(x, *routed) + own) < EXPERT_ERRORS[scheme, dtype], rows


def routes(rows: int, topk: int, generator: torch.Generator) -> list[Tensor]:
    """int32 `[rows, topk]`: at random without one expert, and all rows to the same (the last one first)."""
    some = torch.stack([torch.randperm(4, generator=generator)[:topk] for _ in range(rows)])
    same = torch.tensor([4, 0])[:topk].expand(rows, topk)
    return [some.int(), same.int().contiguous()]


def expected_experts(x: Tensor, first: Tensor, second: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    gate, up = torch.einsum("td,teod->teo", x.double(), first[topk_ids.long()]).chunk(2, dim=-1)
    down = torch.einsum("teo,tedo->ted", silu(gate) * up, second[topk_ids.long()])
    return (down * topk_weights.double().unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_rows_zero_rows_and_zero_weights(scheme: Int8Kernels, dtype: torch.dtype) -> None:
    levels, scale = weights(torch.Generator(), 64, 64)
    packed = pack(scheme, levels, dtype)
    assert scheme.linear(torch.ones(0, 64, dtype=dtype), packed, scale).shape == (0, 64)
    x = torch.ones(3, 64, dtype=dtype)
    x[1] = 0
    result = scheme.linear(x, packed, scale)
    assert not result[1].any() and result[0].all() and torch.equal(result[0], result[2])
    assert not scheme.linear(x, pack(scheme, torch.zeros_like(levels), dtype), scale).any()
    experts = pack_experts(scheme, *(torch.ones(2, 64, size, dtype=torch.int8) for size in (64, 32)), dtype)
    nowhere = torch.ones(0, 1), torch.ones(0, 1, dtype=torch.int32)
    scales = torch.ones(2, 64), torch.ones(2, 64)
    assert scheme.experts(torch.ones(0, 64, dtype=dtype), *experts, *scales, *nowhere).shape == (0, 64)


def test_rows_may_be_a_slice_of_something_wider(scheme: Int8Kernels) -> None:
    """As the queries are of a fused projection's output."""
    generator = torch.Generator().manual_seed(0)
    levels, scale = weights(generator, 64, 64)
    packed = pack(scheme, levels, torch.bfloat16)
    wide = torch.randn(5, 192, generator=generator).bfloat16()
    for part in (wide[:, 64:128], wide[:, ::3], wide[:, :5].repeat(1, 13)[:, :64].t().contiguous().t()):
        assert torch.equal(scheme.linear(part, packed, scale), scheme.linear(part.clone(), packed, scale))


def test_compiled(scheme: Int8Kernels) -> None:
    """torch.compile takes the operators as they are, with any number of rows."""
    generator = torch.Generator().manual_seed(0)
    levels, scale = weights(generator, 64, 64)
    packed = pack(scheme, levels, torch.bfloat16)

    def twice(x: Tensor) -> Tensor:
        return scheme.linear(scheme.linear(x, packed, scale) * 0.5, packed, scale)

    compiled = torch.compile(twice, fullgraph=True, dynamic=True)
    for rows in (5, 2, 9):
        x = torch.randn(rows, 64, generator=generator).bfloat16()
        assert error(compiled(x), twice(x).double()) < 3e-3


def test_portable_and_packed_agree(scheme: Int8Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """To bfloat16's rounding, and int8 rows' where a sum of the other order falls to the other side of a level."""
    generator = torch.Generator().manual_seed(0)
    (levels, scale), x = weights(generator, 96, 128), torch.randn(9, 128, generator=generator).bfloat16()
    (w13, w13_scale), (w2, w2_scale) = weights(generator, 2, 192, 128), weights(generator, 2, 128, 96)
    route = torch.rand(9, 1, generator=generator), torch.arange(9).unsqueeze(1).int() % 2

    def both() -> tuple[Tensor, Tensor]:
        linear = scheme.linear(x, pack(scheme, levels, x.dtype), scale)
        experts = pack_experts(scheme, w13, w2, x.dtype)
        return linear, scheme.experts(x, *experts, w13_scale, w2_scale, *route)

    packed = both()
    monkeypatch.setattr(operators, "available", lambda: False)
    assert torch.equal(pack(scheme, levels, x.dtype), levels)
    for fast, plain in zip(packed, both(), strict=True):
        assert error(fast, plain.double()) < 6e-3
