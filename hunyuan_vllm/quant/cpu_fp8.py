"""Linear layers and experts with FP8 weights on CPUs, which have no FP8 arithmetic.

On CPUs with AMX, vLLM's kernels multiply E4M3 weights with rows as they are. Elsewhere rows are rounded as on GPUs, and
weights expanded to bfloat16 or float32, in which every E4M3 value is exact: they are as large as unquantised ones, and
there to check a GPU's numbers. Sums are float32; scales are applied to them at the end. (With bfloat16 rows the kernels
hand a sum over in bfloat16: one more rounding than on a GPU, 2⁻⁹ of the value, where E4M3's own are up to 2⁻⁴.)
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear
from torch.nn.functional import silu
from vllm import _custom_ops as ops

from hunyuan_vllm.cpu_kernels import (
    BLOCK_K,
    LINEAR,
    TILE,
    Kernel,
    agrees,
    distinct_scales,
    int8_values,
    kernel,
    random_rows,
    small_routes,
    small_size,
)
from hunyuan_vllm.quant.cpu import portable_experts
from hunyuan_vllm.quant.rounding import E4M3, quantize_per_tensor
from hunyuan_vllm.quant.schemes import FP8


def fits_fp8(layer: str, dtype: torch.dtype, outputs: int, inputs: int) -> bool:
    """Whether weights stay E4M3, for vLLM's kernels for AMX: `[outputs, inputs]`, of experts those of w2, no biases."""
    if dtype != torch.bfloat16 or outputs % TILE or inputs % TILE or kernel(FP8, layer) is not Kernel.AMX:
        return False
    return (_fp8_linear_agrees if layer == LINEAR else _fp8_experts_agree)(small_size(outputs), small_size(inputs))


def prepare_fp8(weight: Tensor, dtype: torch.dtype, stays: bool) -> Tensor:
    """E4M3 `[..., out, in]` → what `fp8_linear` and `fp8_experts` take, for a model that computes in `dtype`; scales
    are not applied. float16 models get float32 weights: sums of unscaled values would overflow.

    Args:
        stays: what `fits_fp8` says.
    """
    if stays:
        return torch.ops._C.convert_weight_packed(weight.contiguous())
    expanded = weight.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    outputs, inputs = weight.shape[-2:]
    if _packs(outputs, inputs, expanded.dtype):
        return torch.ops._C.convert_weight_packed(expanded)
    return expanded


def _packs(outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether vLLM's packed kernel multiplies expanded weights `[outputs, inputs]`."""
    fits = inputs % TILE == 0 and outputs % (TILE // 2) == 0
    return dtype == torch.bfloat16 and fits and kernel(FP8, LINEAR) is Kernel.PACKED


@cache
def _fp8_linear_agrees(outputs: int, inputs: int) -> bool:
    weight, scale, input_scale = int8_values(outputs, inputs).to(E4M3), distinct_scales(outputs), distinct_scales(1)
    return agrees(
        "vLLM's fp8_scaled_mm_cpu",
        random_rows(inputs),
        lambda x: fp8_linear(x, prepare_fp8(weight, x.dtype, stays=True), scale, input_scale, None),
        lambda x: x.float() @ (weight.float() * scale.unsqueeze(1)).t(),
    )


@cache
def _fp8_experts_agree(hidden: int, width: int) -> bool:
    weights = [int8_values(3, 2 * width, hidden).to(E4M3), int8_values(3, hidden, width).to(E4M3)]
    scales, input_scale = [distinct_scales(3), distinct_scales(3).flip(0)], distinct_scales(1)

    def theirs(x: Tensor) -> Tensor:
        packed = (prepare_fp8(weight, x.dtype, stays=True) for weight in weights)
        return fp8_experts(x, *packed, *scales, input_scale, input_scale, None, None, *small_routes(len(x)))

    def expected(x: Tensor) -> Tensor:
        plain = (weight.float() for weight in weights)
        by_row = (scale.view(3, 1).expand(weight.shape[:2]) for weight, scale in zip(weights, scales, strict=True))
        tensors = (*plain, *by_row, *small_routes(len(x)))
        return portable_experts(lambda rows, w, scale: rows.float() @ w.t() * scale, x, *tensors)

    return agrees("vLLM's fused_experts_cpu (fp8)", random_rows(hidden), theirs, expected)


@torch.library.custom_op("hunyuan_vllm::fp8_linear", mutates_args=())
def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x · (scale ⊙ weight)ᵀ + bias, in x's type.

    Args:
        x: `[..., in]`.
        weight: from `prepare_fp8`, of E4M3 `[out, in]`.
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
        w13, w2: from `prepare_fp8`, of E4M3 `[experts, 2 · intermediate, hidden]` (gate's rows, then up's) and
            `[experts, hidden, intermediate]`.
        w13_scale, w2_scale: the weights', float32 `[experts]`.
        w13_input_scale, w2_input_scale: float32 `[]`, of hidden and of silu(gate) ⊙ up.
        w13_bias, w2_bias: `[experts, 2 · intermediate]` and `[experts, hidden]`.
        topk_weights, topk_ids: `[tokens, k]`.
    """
    if w13.dtype == E4M3:
        return _fused_fp8_experts(hidden.contiguous(), w13, w2, w13_scale, w2_scale, topk_weights, topk_ids)
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


def _fused_fp8_experts(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor,
    w2_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    """One scale for all output channels of an expert, as blocks of vLLM's have it."""
    experts, size, width = w2.shape

    def blocks(scale: Tensor, inputs: int) -> Tensor:
        return scale.view(experts, 1, 1).expand(-1, 1, -(-inputs // BLOCK_K)).contiguous()

    output = torch.empty_like(hidden)
    ops.fused_experts_cpu(
        output,
        hidden,
        w13,
        w2,
        topk_weights.float().contiguous(),
        topk_ids.int().contiguous(),
        ops.CPUQuantMethod.FP8_W8A16,
        blocks(w13_scale, size),
        blocks(w2_scale, width),
        None,
        None,
        [max(2 * width, size), BLOCK_K],
    )
    return output


def _fp8_gemm(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor) -> Tensor:
    """float32 `[rows, out]` of x `[rows, in]`."""
    outputs, inputs = weight.shape
    if weight.dtype == E4M3:
        ones = scale.new_ones(1, -(-inputs // BLOCK_K))
        sums = torch.ops._C.fp8_scaled_mm_cpu(x, weight, ones, [outputs, BLOCK_K], None, x.dtype, True)
        return sums.float() * scale
    values = quantize_per_tensor(x, input_scale)[0].to(weight.dtype)
    if _packs(outputs, inputs, weight.dtype):
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
