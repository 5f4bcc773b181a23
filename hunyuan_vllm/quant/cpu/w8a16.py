"""Products of rows with int8 weights (weight-only quantisation): sums and scales are float32, nothing else is rounded.

bfloat16 rows go through our own kernel (`w8a16.cpp`), which reads one byte a weight; everything else is `portable.py`.
See `operators.py` for what the functions take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hunyuan_vllm.quant.cpu import portable
from hunyuan_vllm.quant.cpu.native import kernels
from hunyuan_vllm.quant.cpu.operators import define_experts, define_linear
from hunyuan_vllm.quant.cpu.portable import weight_only_product

__all__ = ["experts", "linear", "pack_experts", "pack_linear"]

_LANES = 16  # channels of either half in a block


def pack_linear(weight: Tensor) -> Tensor:
    """int8 `[out, in]` → what `linear` takes: uint8 `[blocks, in / 2, 64]`, or the weight where there is no kernel."""
    return pack_experts(weight.unsqueeze(0)).squeeze(0)


def pack_experts(weight: Tensor) -> Tensor:
    """int8 `[experts, out, in]` → what `experts` takes."""
    native = kernels()
    experts, outputs, inputs = weight.shape
    weight = weight.contiguous()
    if native is None or inputs % 2:
        return weight
    packed = torch.empty(experts, native.w8a16_blocks(outputs), inputs // 2, 64, dtype=torch.uint8)
    for to, expert in zip(packed, weight, strict=True):
        native.w8a16_pack(to.data_ptr(), expert.data_ptr(), outputs, inputs, torch.get_num_threads())
    return packed


def _linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    native = kernels()
    outputs, inputs = len(scale), x.shape[1]
    if native is None or packed.dim() == 2 or x.dtype != torch.bfloat16:
        return portable.linear(weight_only_product, x, _unpack(packed, outputs, inputs), scale, bias)
    x = _with_dense_rows(x)
    bias = None if bias is None else bias.float()
    output = x.new_empty(len(x), outputs)
    native.w8a16_linear(
        output.data_ptr(),
        x.data_ptr(),
        x.stride(0),
        packed.data_ptr(),
        scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        len(x),
        outputs,
        inputs,
        torch.get_num_threads(),
    )
    return output


def _experts(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor,
    w2_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    native = kernels()
    tokens, topk = topk_ids.shape
    experts, size = w2_scale.shape
    width = w13_scale.shape[1] // 2
    if native is None or w13.dim() == w2.dim() == 3 or hidden.dtype != torch.bfloat16:
        w13, w2 = _unpack(w13, 2 * width, size), _unpack(w2, size, width)
        return portable.experts(weight_only_product, hidden, w13, w2, w13_scale, w2_scale, topk_weights, topk_ids)
    hidden = _with_dense_rows(hidden)
    topk_weights, topk_ids = topk_weights.float().contiguous(), topk_ids.int().contiguous()
    output = torch.empty_like(hidden)
    inner = hidden.new_empty(tokens * topk, width)
    parts = torch.empty(tokens * topk, size, dtype=torch.float32) if topk > 1 else output
    tensors = (w13, w2, w13_scale, w2_scale, topk_weights, topk_ids, inner, parts)
    native.w8a16_experts(
        output.data_ptr(),
        hidden.data_ptr(),
        hidden.stride(0),
        *(tensor.data_ptr() for tensor in tensors),
        tokens,
        topk,
        experts,
        size,
        width,
        torch.get_num_threads(),
    )
    return output


def _with_dense_rows(x: Tensor) -> Tensor:
    """The kernel takes any stride from row to row."""
    return x if x.stride(1) == 1 else x.contiguous()


def _unpack(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The int8 weights (`[..., outputs, inputs]`) of `packed`."""
    if packed.dtype == torch.int8:
        return packed
    *experts, blocks, _, _ = packed.shape
    signed = torch.where(packed < 128, packed, 128 - packed).view(torch.int8)
    # [block, pair of inputs, group of 4 channels, half, channel, input] → [half, block, group, channel, pair, input]
    places = signed.view(*experts, blocks, inputs // 2, _LANES // 4, 2, 4, 2)
    first = len(experts)
    order = [*range(first), *(first + axis for axis in (3, 0, 2, 4, 1, 5))]
    halves = places.permute(order).reshape(*experts, 2, blocks * _LANES, inputs)
    half = (outputs + 1) // 2
    return torch.cat([halves[..., 0, :half, :], halves[..., 1, : outputs - half, :]], dim=-2)


linear = define_linear("w8a16", _linear)
experts = define_experts("w8a16", _experts)
