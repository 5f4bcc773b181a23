"""Products of rows rounded to int8, token by token while computing, with int8 weights (W8A8): sums are integers.

bfloat16 rows go through vLLM's packed int8 kernels, which vLLM keeps to AMX machines and which run just as well with
AVX-512 VNNI; everything else is `portable.py`. See `operators.py` for what the functions take.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm import _custom_ops as ops

from hunyuan_vllm.quant.cpu import portable
from hunyuan_vllm.quant.cpu.operators import define_experts, define_linear
from hunyuan_vllm.quant.cpu.portable import w8a8_product

__all__ = ["experts", "linear", "pack_experts", "pack_linear"]

_ALIGNMENT = 32  # of a packed weight's inputs and outputs; zeros fill it up, which changes no sum
_GROUP = 4  # inputs of a channel that lie together; behind each block's weights are its channels' sums, in int32


@cache
def _has_packed_kernels() -> bool:
    has_instructions = torch.cpu._is_vnni_supported() and torch.cpu._is_avx512_bf16_supported()
    return has_instructions and hasattr(torch.ops._C, "int8_scaled_mm_with_quant")


def pack_linear(weight: Tensor) -> Tensor:
    """int8 `[out, in]` → what `linear` takes: int8 `[out, in + 4]` with both aligned, or the weight if not packed."""
    if not _has_packed_kernels():
        return weight.contiguous()
    return torch.ops._C.convert_weight_packed(_aligned(weight).contiguous())


def pack_experts(weight: Tensor) -> Tensor:
    """int8 `[experts, out, in]` → what `experts` takes; the halves of `out` (gate and up) are aligned each."""
    if not _has_packed_kernels():
        return weight.contiguous()
    experts, outputs, inputs = weight.shape
    halves = _aligned(weight.view(experts, 2, outputs // 2, inputs))
    return torch.ops._C.convert_weight_packed(halves.flatten(1, 2).contiguous())


def linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `operators.Linear`."""
    if not _takes(x, packed):
        return _linear(x, packed, scale, bias)
    outputs, inputs = len(scale), x.shape[1]
    short = _missing(outputs)
    if short:
        scale, bias = pad(scale, (0, short)), None if bias is None else pad(bias, (0, short))
    if _missing(inputs):
        x = pad(x, (0, _missing(inputs)))
    bias = None if bias is None else bias.float()
    output = torch.ops._C.int8_scaled_mm_with_quant(x, packed, scale, bias, x.dtype, True)
    return output[:, :outputs].contiguous() if short else output


def experts(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor,
    w2_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    """See `operators.Experts`."""
    # Without padding of the hidden axis: neither of w13's inputs nor of the halves of w2's outputs.
    if not _takes(hidden, w13) or hidden.shape[1] % (2 * _ALIGNMENT):
        return _experts(hidden, w13, w2, w13_scale, w2_scale, topk_weights, topk_ids)
    width = w13_scale.shape[1] // 2
    if _missing(width):
        w13_scale = pad(w13_scale.unflatten(1, (2, width)), (0, _missing(width))).flatten(1)
    output, kind = torch.empty_like(hidden), ops.CPUQuantMethod.INT8_W8A8
    scales = dict(w1_scale=w13_scale, w2_scale=w2_scale, w1_zero=None, w2_zero=None, block_size=None)
    ops.fused_experts_cpu(output, hidden, w13, w2, topk_weights.float(), topk_ids.int(), kind, **scales)
    return output


def _aligned(weight: Tensor) -> Tensor:
    """`[..., out, in]` with both aligned; copied only if they were not."""
    short_of = (0, _missing(weight.shape[-1]), 0, _missing(weight.shape[-2]))
    return pad(weight, short_of) if any(short_of) else weight


def _missing(size: int) -> int:
    return -size % _ALIGNMENT


def _takes(x: Tensor, packed: Tensor) -> bool:
    """Whether the packed kernels take these rows: they end the process where they do not."""
    return packed.shape[-1] != x.shape[-1] and x.dtype == torch.bfloat16 and x.shape[0] > 0


def _portable_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    outputs, inputs = len(scale), x.shape[1]
    weight = packed if packed.shape[1] == inputs else _unpack(packed)[:outputs, :inputs]
    return portable.linear(w8a8_product, x, weight, scale, bias)


def _portable_experts(
    hidden: Tensor, w13: Tensor, w2: Tensor, w13_scale: Tensor, w2_scale: Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> Tensor:
    size, width = hidden.shape[1], w13_scale.shape[1] // 2
    if w13.shape[-1] != size:
        w13, w2 = _unpack_halves(w13, width, size), _unpack_halves(w2, size // 2, width)
    return portable.experts(w8a8_product, hidden, w13, w2, w13_scale, w2_scale, topk_weights, topk_ids)


def _unpack(packed: Tensor) -> Tensor:
    """int8 `[..., out, in]` with the alignment's zeros."""
    *experts, outputs, stride = packed.shape
    inputs, blocks = stride - 4, outputs // _ALIGNMENT
    weights = packed.view(*experts, blocks, _ALIGNMENT * stride)[..., : _ALIGNMENT * inputs]
    places = weights.unflatten(-1, (inputs // _GROUP, _ALIGNMENT, _GROUP))
    return places.transpose(-3, -2).reshape(*experts, outputs, inputs)


def _unpack_halves(packed: Tensor, half: int, inputs: int) -> Tensor:
    """int8 `[experts, 2 · half, inputs]`."""
    return _unpack(packed).unflatten(1, (2, -1))[:, :, :half, :inputs].flatten(1, 2)


_linear = define_linear("w8a8", _portable_linear)
_experts = define_experts("w8a8", _portable_experts)
