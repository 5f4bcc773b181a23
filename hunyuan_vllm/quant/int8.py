"""Symmetric int8 weights, one scale an output channel: rounding to them, and four of them in an int32.

What the quantised loader, the converter and the tests of the kernels share.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LEVELS", "pack_int8", "quantize_per_channel", "unpack_int8"]

LEVELS = 127  # a side: -128 stays unused, so that the range is symmetric
_SIGN_BIT = -2139062144  # 0x80808080 as an int32: flips four int8 to their offset-binary form and back


def quantize_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of `weight [out, in]` to 127 levels a side: int8 `[out, in]` and float32 `[out, 1]`, with
    weight ≈ int8 · scale. A row of zeros has scale 1. On `weight`'s device, in float32."""
    weight = weight.float()
    scale = weight.abs().amax(dim=-1, keepdim=True) / LEVELS
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale).round_().to(torch.int8), scale


def pack_int8(weight: Tensor) -> Tensor:
    """int8 `[out, in]` → int32 `[out, in / 4]`: four input channels, the first in the lowest byte, each plus 128
    (compressed-tensors' `pack-quantized`). `in` must be a multiple of 4."""
    return weight.contiguous().view(torch.int32) ^ _SIGN_BIT


def unpack_int8(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of `pack_int8`: int8 `[out, in_features]`."""
    return (packed.contiguous() ^ _SIGN_BIT).view(torch.int8)[..., :in_features]
