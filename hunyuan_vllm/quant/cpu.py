"""Linear layers and experts with quantised weights on CPUs.

int8 runs in the C++ kernels, or in plain torch, which defines what these compute. FP8 is there to check a GPU's
numbers: CPUs have no FP8 arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear
from torch.nn.functional import silu
from vllm import _custom_ops as ops

from hunyuan_vllm.cpu import packs
from hunyuan_vllm.native import operators
from hunyuan_vllm.quant.rounding import quantize_per_tensor

_BLOCK = 512  # output channels expanded to float32 at a time
_LIBRARY = torch.library.Library("hunyuan_vllm", "FRAGMENT")

Gemm = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x `[tokens, in]`, int8 weight `[out, in]`, float32 scale `[out]`) → float32 `[tokens, out]`."""

SharedExpert = tuple[Tensor, Tensor, Tensor, Tensor]
"""From `pack_linear`: w13, of int8 `[2 · intermediate, hidden]`, w2, of `[hidden, intermediate]`; and their scales."""


class Int8Kernels:
    """Linear layers and SiLU-gated experts with int8 weights.

    A weight is packed once and is then opaque: only the kernels that packed it can read it.

    Args:
        name: the C++ operators' prefix.
        gemm: what is computed, in plain torch.
    """

    def __init__(self, name: str, gemm: Gemm) -> None:
        self.name = name
        self._portable_linear = _define(
            f"{name}_portable_linear",
            "(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
            lambda *tensors: _int8_linear(gemm, *tensors),
            lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
        )
        self._portable_experts = _define(
            f"{name}_portable_experts",
            "(Tensor hidden, Tensor w13, Tensor w2, Tensor w13_scale, Tensor w2_scale, Tensor topk_weights, "
            "Tensor topk_ids) -> Tensor",
            lambda *tensors: _int8_experts(gemm, *tensors),
            lambda hidden, *_: hidden.new_empty(hidden.shape),
        )

    def pack_linear(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """int8 `[out, in]` → what `linear` takes for rows of type `dtype`."""
        return self.pack_experts(weight.unsqueeze(0), dtype).squeeze(0)

    def pack_experts(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """int8 `[experts, out, in]` → what `experts` takes for rows of type `dtype`: uint8, or the weight as it is."""
        if dtype != torch.bfloat16 or not operators.available():
            return weight.contiguous()
        return getattr(torch.ops.hunyuan_vllm, f"{self.name}_pack_experts")(weight)

    def linear(self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        """x · (scale ⊙ weight)ᵀ + bias, `[tokens, out]` in x's type.

        Args:
            x: `[tokens, in]`.
            packed: from `pack_linear`, of int8 `[out, in]`.
            scale: float32 `[out]`.
            bias: `[out]`, any floating type.
        """
        bias = None if bias is None else bias.float()
        if packed.dtype != torch.uint8:
            return self._portable_linear(x, packed, scale, bias)
        return getattr(torch.ops.hunyuan_vllm, f"{self.name}_linear")(x, packed, scale, bias)

    def experts(
        self,
        hidden: Tensor,
        w13: Tensor,
        w2: Tensor,
        w13_scale: Tensor,
        w2_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared: SharedExpert | None = None,
    ) -> Tensor:
        """Σ over a token's experts of weight · w2(silu(gate) ⊙ up), `[tokens, hidden]` in hidden's type.

        Args:
            hidden: `[tokens, hidden]`.
            w13, w2: from `pack_experts`, of int8 `[experts, 2 · intermediate, hidden]` (gate's rows, then up's) and
                `[experts, hidden, intermediate]`.
            w13_scale, w2_scale: float32 `[experts, 2 · intermediate]` and `[experts, hidden]`.
            topk_weights, topk_ids: float32 and int32 `[tokens, k]`.
            shared: added with weight 1; for packed weights only.
        """
        tensors = (w13, w2, w13_scale, w2_scale, topk_weights.float().contiguous(), topk_ids.int().contiguous())
        if w13.dtype != torch.uint8:
            assert shared is None
            return self._portable_experts(hidden, *tensors)
        return getattr(torch.ops.hunyuan_vllm, f"{self.name}_experts")(hidden, *tensors, *(shared or (None,) * 4))


def _define(name: str, schema: str, compute: Callable, fake: Callable) -> Callable[..., Tensor]:
    """An operator for CPU tensors, which torch.compile does not look into; `fake` is for tensors without data."""
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, compute, "CPU")
    torch.library.register_fake(f"hunyuan_vllm::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.hunyuan_vllm, name).default


def _w8a16_gemm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    x = x.float()
    product = x.new_empty(len(x), len(weight))
    for start in range(0, len(weight), _BLOCK):
        block = slice(start, start + _BLOCK)
        product[:, block] = x @ weight[block].float().t()
    return product * scale


def _w8a8_gemm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    x = x.float()
    row_scale = x.abs().amax(dim=-1, keepdim=True) / 127
    row_scale = torch.where(row_scale == 0, 1.0, row_scale)
    return torch._int_mm((x / row_scale).round().to(torch.int8), weight.t()) * row_scale * scale


def _int8_linear(gemm: Gemm, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    result = gemm(x, weight, scale)
    return (result if bias is None else result + bias.float()).to(x.dtype)


def _int8_experts(
    gemm: Gemm,
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor,
    w2_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    """What lies between the two GEMMs is rounded to hidden's type."""
    output = torch.zeros(hidden.shape, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = gemm(hidden[rows], w13[expert], w13_scale[expert]).chunk(2, dim=-1)
        inner = (silu(gate) * up).to(hidden.dtype)
        down = gemm(inner, w2[expert], w2_scale[expert])
        output.index_add_(0, rows, down * topk_weights[rows, slots, None].float())
    return output.to(hidden.dtype)


w8a16 = Int8Kernels("w8a16", _w8a16_gemm)
"""int8 weights, activations as they are: sums and scales are float32, nothing else is rounded."""
w8a8 = Int8Kernels("w8a8", _w8a8_gemm)
"""int8 weights, and activations rounded to int8 token by token while computing: sums are integers."""


# FP8. Weights are expanded to bfloat16 or float32, in which every E4M3 value is exact, and stay as large as unquantised
# ones. Sums are float32; the scales of both sides are applied to them at the end. (With bfloat16 weights the kernel
# hands a sum over in bfloat16: one more rounding than on a GPU, 2⁻⁹ of the value, where E4M3's own are up to 2⁻⁴.)


def expand_fp8(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """E4M3 `[..., out, in]` → what `fp8_linear` and `fp8_experts` take, for a model that computes in `dtype`; scales
    are not applied. float16 models get float32 weights: sums of unscaled values would overflow."""
    expanded = weight.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    outputs, inputs = weight.shape[-2:]
    if packs(outputs, inputs, expanded.dtype):
        return torch.ops._C.convert_weight_packed(expanded)
    return expanded


@torch.library.custom_op("hunyuan_vllm::fp8_linear", mutates_args=())
def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x · (scale ⊙ weight)ᵀ + bias, in x's type.

    Args:
        x: `[..., in]`.
        weight: from `expand_fp8`, of E4M3 `[out, in]`.
        scale: the weight's, float32 `[out]`.
        input_scale: x's, float32 `[]`.
        bias: `[out]`.
    """
    product = _fp8_gemm(x.reshape(-1, x.shape[-1]), weight, scale, input_scale)
    result = product if bias is None else product + bias.float()
    return result.to(x.dtype).view(*x.shape[:-1], -1)


@fp8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("hunyuan_vllm::fp8_experts", mutates_args=())
def fp8_experts(
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
        w13, w2: from `expand_fp8`, of E4M3 `[experts, 2 · intermediate, hidden]` (gate's rows, then up's) and
            `[experts, hidden, intermediate]`.
        w13_scale, w2_scale: the weights', float32 `[experts]`.
        w13_input_scale, w2_input_scale: float32 `[]`, of hidden and of silu(gate) ⊙ up.
        w13_bias, w2_bias: `[experts, 2 · intermediate]` and `[experts, hidden]`.
        topk_weights, topk_ids: `[tokens, k]`.
    """
    output = torch.zeros(hidden.shape, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
        gate_up = _fp8_gemm(hidden[rows], w13[expert], w13_scale[expert], w13_input_scale)
        if w13_bias is not None:
            gate_up += w13_bias[expert]
        gate, up = gate_up.to(hidden.dtype).chunk(2, dim=-1)
        down = _fp8_gemm(silu(gate) * up, w2[expert], w2_scale[expert], w2_input_scale)
        if w2_bias is not None:
            down += w2_bias[expert]
        output.index_add_(0, rows, down * topk_weights[rows, slots, None].float())
    return output.to(hidden.dtype)


@fp8_experts.register_fake
def _(hidden: Tensor, *_: Tensor | None) -> Tensor:
    return torch.empty_like(hidden)


def _fp8_gemm(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor) -> Tensor:
    """float32 `[rows, out]` of x `[rows, in]`."""
    values = quantize_per_tensor(x, input_scale)[0].to(weight.dtype)
    outputs, inputs = weight.shape
    if packs(outputs, inputs, weight.dtype):
        sums = ops.weight_packed_linear_cpu(values, weight, outputs, None)
    else:
        sums = plain_linear(values, weight)
    return sums.float() * (scale * input_scale)


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
