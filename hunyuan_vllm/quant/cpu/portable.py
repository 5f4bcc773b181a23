"""The int8 products in plain torch, for any CPU and any shape: what the fast kernels must agree with.

Weights are int8 `[out, in]` or `[experts, out, in]`, scales float32 by output channel; sums and scaling are float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

__all__ = ["experts", "linear", "quantize_rows", "w8a8_product", "weight_only_product"]

_BLOCK = 512  # output channels expanded to float32 at a time

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x `[tokens, in]`, weight `[out, in]`, scale `[out]`) → float32 `[tokens, out]`."""


def weight_only_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x · (scale ⊙ weight)ᵀ."""
    x = x.float()
    product = x.new_empty(len(x), len(weight))
    for start in range(0, len(weight), _BLOCK):
        block = slice(start, start + _BLOCK)
        product[:, block] = x @ weight[block].float().t()
    return product * scale


def w8a8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """As `weight_only_product`, of x rounded to int8 token by token."""
    rows, row_scale = quantize_rows(x)
    return torch._int_mm(rows, weight.t()) * row_scale * scale


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 `[tokens, in]` and float32 `[tokens, 1]`: symmetric, 127 levels a side, a token's greatest value is 127."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (x / scale).round().to(torch.int8), scale


def linear(product: Product, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[tokens, out]` in x's type."""
    result = product(x, weight, scale)
    return (result if bias is None else result + bias.float()).to(x.dtype)


def experts(
    product: Product,
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor,
    w2_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    """SiLU-gated experts, `[tokens, hidden]` in hidden's type; what lies between the two products is rounded to it."""
    output = torch.zeros(hidden.shape, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = product(hidden[rows], w13[expert], w13_scale[expert]).chunk(2, dim=-1)
        inner = (silu(gate) * up).to(hidden.dtype)
        down = product(inner, w2[expert], w2_scale[expert])
        output.index_add_(0, rows, down * topk_weights[rows, slots, None].float())
    return output.to(hidden.dtype)
