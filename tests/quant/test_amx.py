"""vLLM's kernels for AMX: which layers they serve, what they are handed, and that ours stay where they are wrong.

Off such a machine stand-ins take their place, with the schemas of the operators in the installed wheel. They check what
the C++ checks, and compute in plain torch.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from test_cpu import error, expanded, expected_experts, weights
from torch import Tensor, nn
from vllm.utils.torch_utils import set_default_torch_dtype

from hunyuan_vllm import cpu_kernels
from hunyuan_vllm.cpu_kernels import CPU, EXPERTS, LINEAR, Kernel
from hunyuan_vllm.native import operators
from hunyuan_vllm.quant import cpu as quant_cpu
from hunyuan_vllm.quant import cpu_fp8
from hunyuan_vllm.quant.cpu import w8a8, w8a16
from hunyuan_vllm.quant.cpu_fp8 import fits_fp8, fp8_experts, fp8_linear, prepare_fp8
from hunyuan_vllm.quant.fp8_layers import CPUFp8LinearMethod
from hunyuan_vllm.quant.int8_layers import Int8LinearMethod
from hunyuan_vllm.quant.rounding import E4M3
from hunyuan_vllm.quant.schemes import BF16, FP8, INT8

OPERATORS = ("convert_weight_packed", "int8_scaled_mm_with_quant", "fused_experts_cpu", "fp8_scaled_mm_cpu")
LIBRARY = Path(vllm.__file__).parent / "_C.abi3.so"  # for AVX-512 BF16 and AMX: other CPUs cannot even load it
HAS_AMX = torch.cpu._is_amx_tile_supported()
BOTH = pytest.mark.parametrize("shape", [(64, 96), (160, 32)], ids=str)


def schemas() -> dict[str, str]:
    with LIBRARY.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = {}
        for name in OPERATORS:
            match = re.search(rb"\0(" + name.encode() + rb"\([^\0]*\) -> [^\0]*)\0", content)
            assert match, f"no {name} in {LIBRARY}"
            found[name] = match[1].decode()
    return found


def convert_weight_packed(weight: Tensor) -> Tensor:
    assert weight.is_contiguous() and weight.ndim in (2, 3) and weight.dtype in (torch.int8, E4M3)
    assert weight.shape[-2] % 32 == 0 and weight.shape[-1] % 32 == 0
    if weight.dtype == E4M3:
        return weight.clone()
    return torch.cat((weight, torch.full((*weight.shape[:-1], 4), 99, dtype=torch.int8)), dim=-1)


def int8_scaled_mm_with_quant(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, packed: bool
) -> Tensor:
    assert packed and x.stride(-1) == 1 and x.ndim == 2 and x.dtype == dtype == torch.bfloat16
    assert weight.dtype == torch.int8 and weight.is_contiguous() and weight.shape[1] == x.shape[1] + 4
    assert scale.dtype == torch.float32 and scale.is_contiguous() and scale.numel() == weight.shape[0]
    assert bias is None or (bias.dtype == torch.float32 and bias.shape == (weight.shape[0],))
    return w8a8._portable_linear(x, weight[:, :-4].contiguous(), scale, bias)


def fused_experts_cpu(*arguments: Any) -> None:
    out, x, w13, w2, topk_weights, topk_ids, method, s13, s2, zero13, zero2, a13, block, *rest, packed = arguments
    (experts, outputs, _), (tokens, hidden), width = w13.shape, x.shape, w13.shape[1] // 2
    assert all(tensor.is_contiguous() for tensor in (out, x, w13, w2, s13, s2)) and out.shape == x.shape
    assert topk_ids.dtype == torch.int32 and topk_ids.shape == topk_weights.shape and len(topk_ids) == tokens
    assert s13.dtype == s2.dtype == torch.float32 and x.dtype == torch.bfloat16 and packed
    assert zero13 is zero2 is a13 is None and rest == [None] * 4 and w2.shape[:2] == (experts, hidden)
    if method == 1:
        assert block is None and w13.dtype == w2.dtype == torch.int8
        assert w13.shape[2] == hidden + 4 and w2.shape[2] == width + 4
        assert s13.numel() == experts * outputs and s2.numel() == experts * hidden
        plain = w13[:, :, :-4].contiguous(), w2[:, :, :-4].contiguous()
        out.copy_(w8a8._portable_experts(x, *plain, s13, s2, topk_weights, topk_ids))
        return
    assert method == 2 and w13.dtype == w2.dtype == E4M3 and block[0] % 32 == 0 and block[1] == 128
    blocks = [-(-size // block[i % 2]) for i, size in enumerate((outputs, hidden, hidden, width))]
    assert s13.shape == (experts, *blocks[:2]) and s2.shape == (experts, *blocks[2:])
    whole = []
    for weight, scale in ((w13, s13), (w2, s2)):
        by_weight = scale.repeat_interleave(block[0], 1).repeat_interleave(128, 2)
        whole.append(weight.double() * by_weight[:, : weight.shape[1], : weight.shape[2]])
    out.copy_(expected_experts(x, *whole, topk_weights, topk_ids))


def fp8_scaled_mm_cpu(
    x: Tensor, weight: Tensor, scale: Tensor, block: list[int], bias: Tensor | None, dtype: torch.dtype, packed: bool
) -> Tensor:
    outputs, inputs = weight.shape
    assert packed and x.stride(-1) == 1 and x.shape[1] == inputs and x.dtype == dtype == torch.bfloat16
    assert weight.dtype == E4M3 and weight.is_contiguous() and bias is None
    assert scale.dtype == torch.float32 and scale.is_contiguous() and block[0] % 32 == 0 and block[1] == 128
    assert scale.shape == (-(-outputs // block[0]), -(-inputs // 128)) and bool((scale == 1).all())
    return (x.float() @ weight.float().t()).to(dtype)


def forget_agreements() -> None:
    for module in (quant_cpu, cpu_fp8):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Callable]]:
    """A CPU with AMX; returns what its operators call, to be replaced."""
    calls = {name: globals()[name] for name in OPERATORS}
    for name in ("avx2", "avx512", "avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: True)
    forget_agreements()
    library = torch.library.Library("_C", "FRAGMENT")
    if not HAS_AMX:
        for name, schema in schemas().items():
            is_there = hasattr(torch.ops._C, name)  # vLLM's library for AVX-512 has some of them
            if not is_there:
                library.define(schema)
            library.impl(name, lambda *given, name=name: calls[name](*given), "CPU", allow_override=is_there)
    yield calls
    library._destroy()
    forget_agreements()


pytestmark = pytest.mark.skipif(not HAS_AMX and not LIBRARY.exists(), reason="not vLLM's build for CPUs")
stand_ins = pytest.mark.skipif(HAS_AMX, reason="this CPU has the kernels themselves")


@BOTH
def test_int8_linear(shape: tuple[int, int], amx: dict[str, Callable]) -> None:
    generator = torch.Generator().manual_seed(0)
    levels, scale = weights(generator, *shape)
    kernel = w8a8.choose(LINEAR, torch.bfloat16, *shape)
    assert kernel is Kernel.AMX
    packed, bias = w8a8.pack(levels, kernel), torch.randn(shape[0], generator=generator)
    assert packed.dtype == torch.int8 and packed.shape == (shape[0], shape[1] + 4)
    for rows in (1, 5, 40):
        x = torch.randn(rows, 2 * shape[1], generator=generator).bfloat16()[:, : shape[1]]
        for given in (None, bias):
            expected = x.double() @ expanded(levels, scale).t() + (0 if given is None else given.double())
            assert error(w8a8.linear(x, packed, scale, given), expected) < 1.5e-2


@BOTH
@pytest.mark.parametrize("topk", [1, 2])
def test_int8_experts(shape: tuple[int, int], topk: int, amx: dict[str, Callable]) -> None:
    (hidden, width), generator = shape, torch.Generator().manual_seed(topk)
    (w13, s13), (w2, s2) = weights(generator, 5, 2 * width, hidden), weights(generator, 5, hidden, width)
    kernel = w8a8.choose(EXPERTS, torch.bfloat16, hidden, width)
    assert kernel is Kernel.AMX
    packed = w8a8.pack(w13, kernel), w8a8.pack(w2, kernel)
    for rows in (1, 5, 40):
        x, gates = (
            torch.randn(rows, hidden, generator=generator).bfloat16(),
            torch.rand(rows, topk, generator=generator),
        )
        ids = torch.rand(rows, 5, generator=generator).topk(topk).indices  # int64 and any stride are put right
        expected = expected_experts(x, expanded(w13, s13), expanded(w2, s2), gates, ids)
        assert error(w8a8.experts(x, *packed, s13, s2, gates, ids), expected) < 3e-2


@BOTH
def test_fp8_linear(shape: tuple[int, int], amx: dict[str, Callable]) -> None:
    """Rows are not rounded to E4M3: what saturates on a GPU is exact."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(E4M3)
    assert fits_fp8(LINEAR, torch.bfloat16, *shape) and not fits_fp8(LINEAR, torch.float32, *shape)
    packed, scale = prepare_fp8(weight, torch.bfloat16, stays=True), torch.linspace(0.5, 2, shape[0])
    assert packed.dtype == E4M3
    x, bias = torch.randn(2, 5, shape[1], generator=generator).bfloat16(), torch.randn(shape[0], generator=generator)
    expected = x.double() @ (weight.double() * scale.double().unsqueeze(1)).t() + bias.double()
    assert error(fp8_linear(x, packed, scale, torch.tensor(1e-3), bias.bfloat16()), expected) < 1e-2


@BOTH
def test_fp8_experts(shape: tuple[int, int], amx: dict[str, Callable]) -> None:
    (hidden, width), generator = shape, torch.Generator().manual_seed(0)
    w13, w2 = (torch.randn(4, *size, generator=generator).to(E4M3) for size in ((2 * width, hidden), (hidden, width)))
    s13, s2 = torch.rand(4, generator=generator), torch.rand(4, generator=generator)
    assert fits_fp8(EXPERTS, torch.bfloat16, hidden, width)
    packed = [prepare_fp8(weight, torch.bfloat16, stays=True) for weight in (w13, w2)]
    x, gates = torch.randn(9, hidden, generator=generator).bfloat16(), torch.rand(9, 2, generator=generator)
    ids = torch.rand(9, 4, generator=generator).topk(2).indices
    one = torch.ones(())
    result = fp8_experts(x, *packed, s13, s2, one, one, None, None, gates, ids)
    whole = [weight.double() * scale.double().view(4, 1, 1) for weight, scale in ((w13, s13), (w2, s2))]
    assert error(result, expected_experts(x, *whole, gates, ids)) < 1e-2


@pytest.mark.parametrize(("outputs", "inputs"), [(48, 64), (64, 40)])
def test_parts_of_a_tile_are_ours(outputs: int, inputs: int, amx: dict[str, Callable]) -> None:
    ours = Kernel.OURS if operators.available() else Kernel.TORCH
    for layer in (LINEAR, EXPERTS):
        assert w8a8.choose(layer, torch.bfloat16, outputs, inputs) is ours
        assert w8a8.choose(layer, torch.float32, 64, 64) is Kernel.TORCH
        assert not fits_fp8(layer, torch.bfloat16, outputs, inputs)


def raises(*_: object) -> Tensor:
    raise RuntimeError("Unexpected block size, 1x48\nat gemm_int8.cpp")


def misreads(*given: Any) -> Tensor:
    return int8_scaled_mm_with_quant(*given).flip(1)


@stand_ins
@pytest.mark.parametrize(
    ("wrong", "said"),
    [(raises, "Unexpected block size, 1x48"), (misreads, "it differs from ours by 1.")],
    ids=["raises", "misreads"],
)
def test_a_wrong_kernel_is_named_and_not_used(
    wrong: Callable,
    said: str,
    amx: dict[str, Callable],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cpu_kernels.logger, "handlers", [caplog.handler])
    monkeypatch.setattr(cpu_kernels.logger, "propagate", False)
    amx["int8_scaled_mm_with_quant"] = wrong
    ours = Kernel.OURS if operators.available() else Kernel.TORCH
    for _ in range(3):  # layers of one shape
        assert w8a8.choose(LINEAR, torch.bfloat16, 64, 96) is ours
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"vLLM's int8_scaled_mm_with_quant is not used: {said}")
    assert w8a8.choose(EXPERTS, torch.bfloat16, 64, 96) is Kernel.AMX


@pytest.mark.skipif(hasattr(torch.ops._C, "convert_weight_packed"), reason="this CPU's build of vLLM has the operators")
def test_a_build_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_agreements()
    for name in ("avx2", "avx512", "avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: True)
    for layer in (LINEAR, EXPERTS):
        assert w8a8.choose(layer, torch.bfloat16, 64, 96) is not Kernel.AMX
        assert not fits_fp8(layer, torch.bfloat16, 64, 96)
    forget_agreements()


def loaded(**tensors: Tensor) -> nn.Module:
    layer = nn.Module()
    for name, tensor in tensors.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return layer


def test_layers(amx: dict[str, Callable]) -> None:
    """As vLLM has loaded them, with a model's type as the default."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    levels, scale = weights(torch.Generator().manual_seed(0), 96, 64)
    layer, method = loaded(weight=levels, weight_scale=scale.unsqueeze(1)), Int8LinearMethod(w8a8)
    method.dtype = torch.bfloat16
    with set_default_torch_dtype(torch.bfloat16):
        method.process_weights_after_loading(layer)
    assert layer.weight.shape == (96, 68)
    assert error(method.apply(layer, x), x.double() @ expanded(levels, scale).t()) < 1.5e-2

    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)).to(E4M3)
    two_parts, input_scale = torch.tensor([0.5, 2.0]), torch.tensor([1e-3, 1e-3])
    fp8_layer = loaded(weight=weight, weight_scale=two_parts, input_scale=input_scale)
    fp8_layer.logical_widths, fp8_layer.orig_dtype = [32, 64], torch.bfloat16
    fp8_method = CPUFp8LinearMethod()
    with set_default_torch_dtype(torch.bfloat16):
        fp8_method.process_weights_after_loading(fp8_layer)
    assert fp8_layer.weight.dtype == E4M3
    scales = torch.tensor([0.5] * 32 + [2.0] * 64).double().unsqueeze(1)
    assert error(fp8_method.apply(fp8_layer, x), x.double() @ (weight.double() * scales).t()) < 1e-2


def test_what_serves_whom(amx: dict[str, Callable], monkeypatch: pytest.MonkeyPatch) -> None:
    """The table by CPU: bfloat16 and FP8 linear layers, int8 with what it expands from."""

    def row() -> tuple[Kernel, ...]:
        return cpu_kernels.kernel(BF16, LINEAR), cpu_kernels.kernel(FP8, LINEAR), cpu_kernels.kernel(INT8, LINEAR)

    monkeypatch.setattr(operators, "available", lambda: True)
    assert cpu_kernels.cpu() is CPU.AMX and row() == (Kernel.UPSTREAM, Kernel.AMX, Kernel.OURS)
    w8a16.choose(LINEAR, torch.bfloat16, 64, 64)
    assert w8a16.expand_from[LINEAR] > 0
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(cpu_kernels, "has_avx512", lambda: True)
    assert cpu_kernels.cpu() is CPU.AVX512_BF16 and row() == (Kernel.OURS, Kernel.PACKED, Kernel.OURS)
    monkeypatch.setattr(cpu_kernels, "has_avx512", lambda: False)  # the first such CPUs lack VBMI
    assert row() == (Kernel.UPSTREAM, Kernel.PACKED, Kernel.OURS)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert cpu_kernels.cpu() is CPU.AVX512 and row() == (Kernel.UPSTREAM, Kernel.TORCH, Kernel.OURS)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert cpu_kernels.cpu() is CPU.AVX2 and row() == (Kernel.OURS, Kernel.TORCH, Kernel.OURS)
    monkeypatch.setattr(operators, "available", lambda: False)
    assert row() == (Kernel.UPSTREAM, Kernel.TORCH, Kernel.TORCH)
