"""Products of rows rounded through E4M3 with E4M3 weights, on CPUs, which have no FP8 arithmetic: to check a GPU's.

Weights are expanded to bfloat16 or float32, in which every E4M3 value is exact, and stay as large as unquantised ones.
Sums are float32; the scales of both sides are applied to them at the end. (With bfloat16 weights the kernel hands a sum
over in bfloat16: one more rounding than on a GPU, 2⁻⁹ of the value, where E4M3's own are up to 2⁻⁴.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear
from torch.nn.functional import silu
from vllm import _custom_ops as ops

from hunyuan_vllm.cpu import packs
from hunyuan_vllm.quant.rounding import quantize_per_tensor

__all__ = ["expand", "experts", "linear", "to_be_truncated"]


def expand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """E4M3 `[..., out, in]` → what the products take, for a model that computes in `dtype`; scales are not applied.

    float16 models get float32 weights: sums of unscaled values would overflow.
    """
    expanded = weight.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    outputs, inputs = weight.shape[-2:]
    if packs(outputs, inputs, expanded.dtype):
        return torch.ops._C.convert_weight_packed(expanded)
    return expanded


@torch.library.custom_op("hunyuan_vllm::fp8_linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x · (scale ⊙ weight)ᵀ + bias, in x's type.

    Args:
        x: `[..., in]`.
        weight: from `expand`, of E4M3 `[out, in]`.
        scale: the weight's, float32 `[out]`.
        input_scale: x's, float32 `[]`.
        bias: `[out]`.
    """
    product = _product(x.reshape(-1, x.shape[-1]), weight, scale, input_scale)
    result = product if bias is None else product + bias.float()
    return result.to(x.dtype).view(*x.shape[:-1], -1)


@linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("hunyuan_vllm::fp8_experts", mutates_args=())
def experts(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor,
    w2_scale: Tensor,
    w13_input_scale: Tensor,
    w2_input_scale: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    """Σ over a token's experts of weight · w2(silu(gate) ⊙ up), `[tokens, hidden]` in hidden's type.

    Args:
        hidden: `[tokens, hidden]`.
        w13, w2: from `expand`, of E4M3 `[experts, 2 · intermediate, hidden]` (gate's rows, then up's) and `[experts,
            hidden, intermediate]`.
        w13_scale, w2_scale: the weights', float32 `[experts]`.
        w13_input_scale, w2_input_scale: float32 `[]`, of hidden and of silu(gate) ⊙ up.
        w13_bias, w2_bias: `[experts, 2 · intermediate]` and `[experts, hidden]`.
        topk_weights, topk_ids: `[tokens, k]`.
    """
    output = torch.zeros(hidden.shape, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
        gate_up = _product(hidden[rows], w13[expert], w13_scale[expert], w13_input_scale)
        if w13_bias is not None:
            gate_up += w13_bias[expert]
        gate, up = gate_up.to(hidden.dtype).chunk(2, dim=-1)
        down = _product(silu(gate) * up, w2[expert], w2_scale[expert], w2_input_scale)
        if w2_bias is not None:
            down += w2_bias[expert]
        output.index_add_(0, rows, down * topk_weights[rows, slots, None].float())
    return output.to(hidden.dtype)


@experts.register_fake
def _(hidden: Tensor, *_: Tensor | None) -> Tensor:
    return torch.empty_like(hidden)


@torch.library.custom_op("hunyuan_vllm::fp8_to_be_truncated", mutates_args=())
def to_be_truncated(x: Tensor, scale: Tensor) -> Tensor:
    """Numbers of which vLLM's CPU kernel stores in an FP8 cache the E4M3 values nearest to `x / scale`.

    The kernel rounds towards zero, which doubles the error that GPUs make. It is given the nearest values, a
    sixty-fourth larger: less than half a step, so that a kernel that rounds to nearest stores the same.
    """
    values, scale = quantize_per_tensor(x, scale)
    return (values.float() * (scale * (1 + 2**-6))).to(x.dtype)


@to_be_truncated.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


def _product(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor) -> Tensor:
    """float32 `[rows, out]` of x `[rows, in]`."""
    values = quantize_per_tensor(x, input_scale)[0].to(weight.dtype)
    outputs, inputs = weight.shape
    if packs(outputs, inputs, weight.dtype):
        sums = ops.weight_packed_linear_cpu(values, weight, outputs, None)
    else:
        sums = plain_linear(values, weight)
    return sums.float() * (scale * input_scale)
