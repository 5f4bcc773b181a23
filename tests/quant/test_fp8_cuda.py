"""What FP8 does on GPUs, as far as a machine without one shows it: which kernels vLLM chooses, and what they are given.

The kernels themselves are replaced by their arithmetic in torch; none has run here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from checkpoints import random_tensors, tiny_config
from fake_cuda import fake_cuda
from fp8_reference import e4m3, rounded
from meta_model import meta_model
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.model_executor.kernels.linear.scaled_mm import flashinfer as flashinfer_linear
from vllm.model_executor.layers.fused_moe.experts import flashinfer_cutlass_moe
from vllm.model_executor.layers.quantization.utils.fp8_utils import process_fp8_weight_tensor_strategy

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.plugin import register
from hunyuan_vllm.quant.layouts import is_quantised
from hunyuan_vllm.quant.rounding import E4M3

STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
PUBLISHED = HunYuanConfig(
    architectures=["HunYuanForCausalLM"], torch_dtype="bfloat16", use_cla=True, cla_share_factor=2, use_qk_norm=True,
    num_experts=16, use_mixed_mlp_moe=True, num_key_value_heads=8, tie_word_embeddings=True,
    num_hidden_layers=2,
)  # fmt: skip


def scaled_mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, scale_a: Tensor, scale_b: Tensor, bias: Any) -> Tensor:
    """CUTLASS's product: columns of weights `[in, out]` lie together, and both dimensions are multiples of 16."""
    assert a.dtype == b.dtype == E4M3 and b.stride(0) == 1 and not any(size % 16 for size in b.shape)
    assert scale_a.numel() == 1 and scale_b.numel() in (1, b.shape[1])
    product = (a.float() @ b.float()) * scale_a * scale_b.flatten()
    return (product if bias is None else product + bias).to(out_dtype)


def scaled_fp8_quant(x: Tensor, scale: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return e4m3(x.float() / scale).to(E4M3), scale


@contextmanager
def gpu(major: int, minor: int = 0, flashinfer: bool = False) -> Iterator[None]:
    """A GPU of this compute capability for vLLM's selection to see, with FlashInfer installed or not."""
    register()
    with ExitStack() as stack:
        stack.enter_context(patch.object(ops, "cutlass_scaled_mm_supports_fp8", lambda capability: capability >= 89))
        stack.enter_context(patch.object(ops, "cutlass_scaled_mm", scaled_mm))
        stack.enter_context(patch.object(ops, "scaled_fp8_quant", scaled_fp8_quant))
        stack.enter_context(fake_cuda(major, minor))
        stack.enter_context(patch.object(flashinfer_linear, "has_flashinfer", lambda: flashinfer))
        stack.enter_context(
            patch.object(flashinfer_cutlass_moe, "has_flashinfer_cutlass_fused_moe", lambda: flashinfer)
        )
        yield


def kernels(model: nn.Module) -> dict[str, str]:
    """The kernel of each quantised module, by the last parts of its name, of both layers where they differ."""
    chosen = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if hasattr(method, "fp8_linear"):
            chosen[".".join(name.split(".")[-2:])] = type(method.fp8_linear).__name__.removesuffix(
                "ScaledMMLinearKernel"
            )
        elif hasattr(method, "fp8_backend"):
            chosen["experts"] = method.fp8_backend.value
    return chosen


LINEARS = (
    "self_attn.qkv_proj", "self_attn.q_proj", "self_attn.o_proj", "shared_mlp.gate_up_proj", "shared_mlp.down_proj"
)  # fmt: skip


@pytest.mark.parametrize("ranks", [8, 16])
@pytest.mark.parametrize(
    ("capability", "flashinfer", "linears", "experts"),
    [
        ((8, 0), False, "MarlinFP8", "MARLIN"),  # FP8 weights alone: these GPUs have no FP8 arithmetic
        ((8, 9), False, "CutlassFP8", "TRITON"),
        ((9, 0), False, "CutlassFP8", "TRITON"),
        ((9, 0), True, "CutlassFP8", "FLASHINFER_CUTLASS"),
    ],
)
def test_kernels_of_the_published_network(
    capability: tuple[int, int], flashinfer: bool, linears: str, experts: str, ranks: int
) -> None:
    with (
        gpu(*capability, flashinfer),
        meta_model(PUBLISHED, quantization_config=STATIC, tensor_parallel=ranks) as model,
    ):
        assert kernels(model) == dict.fromkeys(LINEARS, linears) | {"experts": experts}
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    columns = 18304 // ranks
    mlp, owner = "model.layers.1.mlp.", "model.layers.0.self_attn.qkv_proj."
    heads = 80 // ranks + 2 * max(1, 8 // ranks)
    assert shapes[f"{owner}weight"] == (heads * 80, 6400)
    assert shapes[f"{owner}weight_scale"] == shapes[f"{owner}input_scale"] == (3,)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (6400 // ranks, 6400)
    assert shapes[f"{mlp}shared_mlp.down_proj.weight"] == (6400, columns)
    assert shapes[f"{mlp}experts.routed_experts.w13_weight"] == (16, 2 * columns, 6400)
    assert shapes[f"{mlp}experts.routed_experts.w2_weight"] == (16, 6400, columns)
    assert shapes[f"{mlp}experts.routed_experts.w13_weight_scale"] == (16, 2)
    eight_bits = {name for name, dtype in types.items() if dtype == E4M3}
    assert eight_bits == {name for name in types if name.endswith(("_proj.weight", "w13_weight", "w2_weight"))}


@pytest.mark.parametrize(("ranks", "down_proj"), [(8, "FlashInferFP8"), (16, "CutlassFP8")])
def test_on_blackwell_what_flashinfer_cannot_do_goes_to_cutlass(ranks: int, down_proj: str) -> None:
    """FlashInfer's product takes one weight scale and no width such as 1144, which is no multiple of 16."""
    with gpu(10, 0, True), meta_model(PUBLISHED, quantization_config=STATIC, tensor_parallel=ranks) as model:
        chosen = kernels(model)
    fused = ("self_attn.qkv_proj", "shared_mlp.gate_up_proj")
    assert {chosen[name] for name in fused} == {"CutlassFP8"}
    assert {chosen[name] for name in ("self_attn.q_proj", "self_attn.o_proj")} == {"FlashInferFP8"}
    assert chosen["shared_mlp.down_proj"] == down_proj


# Widths of a rank of 2 are odd in both senses: 40 columns of the MLPs are 2.5 × 16.
NETWORK = tiny_config(num_hidden_layers=2, intermediate_size=80)


def fp8_tensors() -> dict[str, Tensor]:
    """Every part with a scale of its own, all of them far apart."""
    tensors = dict(random_tensors(NETWORK, seed=0))
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if is_quantised(name)]:
        linear = name.removesuffix(".weight")
        weight = tensors[name].float() * (4 * torch.rand((), generator=generator) + 0.2)
        scale = weight.abs().max() / 448
        tensors[name] = e4m3(weight / scale).to(E4M3)
        tensors[f"{linear}.weight_scale"] = scale
        tensors[f"{linear}.input_scale"] = 0.01 + 0.01 * torch.rand((), generator=generator)
    return tensors


@contextmanager
def loaded(flashinfer: bool = False) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """The second of two ranks on an H100, loaded, not yet processed; and the whole checkpoint."""
    tensors = fp8_tensors()
    with (
        gpu(9, 0, flashinfer),
        meta_model(NETWORK, quantization_config=STATIC, tensor_parallel=2, rank=1, device="cpu") as model,
        patch("hunyuan_vllm.loader.get_tensor_model_parallel_rank", lambda: 1),
    ):
        model.load_weights(tensors.items())
        yield model, tensors


def second_rows(weight: Tensor) -> Tensor:
    return weight[len(weight) // 2 :]


def test_fused_projections_keep_their_scales() -> None:
    """By numbers, against vLLM's common scale, and with widths that have to be padded."""
    with loaded() as (model, tensors):
        for name, parts, cut in (
            ("model.layers.0.self_attn.qkv_proj", "qkv", second_rows),
            ("model.layers.1.mlp.shared_mlp.gate_up_proj", ("gate", "up"), second_rows),
            ("model.layers.1.self_attn.q_proj", "q", second_rows),
            ("model.layers.1.mlp.shared_mlp.down_proj", ("down",), lambda weight: weight[:, 40:]),
        ):
            layer = model.get_submodule(name)
            module = name.rpartition(".")[0]
            linears = [f"{module}.{part}_proj" for part in parts]
            weights = [
                cut(tensors[f"{linear}.weight"].float() * tensors[f"{linear}.weight_scale"]) for linear in linears
            ]
            exact = torch.cat(weights)
            x = torch.randn(5, exact.shape[1]).bfloat16()
            input_scale = max(tensors[f"{linear}.input_scale"] for linear in linears)
            stock = process_fp8_weight_tensor_strategy(
                layer.weight.data.clone(), layer.weight_scale.data, layer.logical_widths, layer.input_scale.data
            )
            layer.quant_method.process_weights_after_loading(layer)
            product = layer.quant_method.apply(layer, x)
            expected = rounded(x.float(), input_scale) @ exact.t()
            assert product.shape == expected.shape
            torch.testing.assert_close(product.float(), expected, rtol=2**-7, atol=1e-3)
            again = (stock[0].t().float() * stock[1]).split(layer.logical_widths)
            errors = [(a - b).norm() / b.norm() for a, b in zip(again, weights, strict=True)]
            assert max(errors) > 0.02 or len(linears) == 1


@pytest.mark.parametrize("flashinfer", [False, True])
def test_experts_are_not_rounded_again(flashinfer: bool) -> None:
    """What the kernels are handed: weights as stored (padded and swapped where FlashInfer wants them so), one scale for
    gate and up, and an inner scale that undoes the difference."""
    with loaded(flashinfer) as (model, tensors):
        layer = model.model.layers[1].mlp.experts.routed_experts
        layer.quant_method.process_weights_after_loading(layer)
        w13, w2 = layer.w13_weight.float(), layer.w2_weight.float()
        scales = {name: parameter.clone() for name, parameter in layer.named_parameters() if name.endswith("scale")}
    width = w2.shape[2]
    assert width == (48 if flashinfer else 40) and not w2[:, :, 40:].any()
    halves = w13.split(width, dim=1)
    gate, up = halves[::-1] if flashinfer else halves
    assert not gate[:, 40:].any() and not up[:, 40:].any()
    assert scales["w13_weight_scale"].shape == scales["w2_weight_scale"].shape == (4,)
    assert scales["w13_input_scale"].numel() == scales["w2_input_scale"].numel() == 1
    inner = []
    for expert in range(4):
        stem = f"model.layers.1.mlp.experts.{expert}."
        stored = {part: tensors[f"{stem}{part}_proj.weight"].float() for part in ("gate", "up", "down")}
        weight_scale = {part: tensors[f"{stem}{part}_proj.weight_scale"] for part in stored}
        assert torch.equal(gate[expert, :40], stored["gate"][40:]) and torch.equal(up[expert, :40], stored["up"][40:])
        assert torch.equal(w2[expert, :, :40], stored["down"][:, 40:])
        ratio = weight_scale["up"] / weight_scale["gate"]
        assert scales["w13_weight_scale"][expert] == weight_scale["gate"]
        torch.testing.assert_close(scales["w2_weight_scale"][expert], weight_scale["down"] * ratio)
        inner.append(tensors[f"{stem}down_proj.input_scale"] / ratio)
    torch.testing.assert_close(scales["w2_input_scale"].flatten()[0], max(inner))
    inputs = [
        tensors[f"model.layers.1.mlp.experts.{e}.{part}_proj.input_scale"] for e in range(4) for part in ("gate", "up")
    ]
    assert scales["w13_input_scale"].flatten()[0] == max(inputs)
