"""Products of rows with int8 weights (weight-only quantisation): sums and scales are float32, nothing else is rounded.

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


linear = define_linear("w8a16", partial(portable.linear, portable.weight_only_product))
experts = define_experts("w8a16", partial(portable.experts, portable.weight_only_product))
