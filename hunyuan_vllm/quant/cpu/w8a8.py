"""Products of rows rounded to int8, token by token while computing, with int8 weights (W8A8): sums are integers.

See `operators.py` for what the functions take.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from hunyuan_vllm.quant.cpu import portable
from hunyuan_vllm.quant.cpu.operators import define_experts, define_linear

__all__ = ["experts", "linear", "pack_experts", "pack_linear"]


def pack_linear(weight: Tensor) -> Tensor:
    """int8 `[out, in]` → what `linear` takes."""
    return weight.contiguous()


def pack_experts(weight: Tensor) -> Tensor:
    """int8 `[experts, out, in]` → what `experts` takes."""
    return weight.contiguous()


linear = define_linear("w8a8", partial(portable.linear, portable.w8a8_product))
experts = define_experts("w8a8", partial(portable.experts, portable.w8a8_product))
