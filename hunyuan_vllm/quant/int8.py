"""Symmetric int8 weights, one scale an output channel: rounding to them, and four of them in an int32.

What the quantised loader, the converter and the tests of the kernels share.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LEVELS", "pack_int8", "quantize_per_channel", "unpack_int8"]

LEVELS = 127  # a side: -128 stays unused, so that the range is symmetric
_CPU_BLOCK = 1 << 19  # weights expanded to float32 at a time: from a core's cache, several times as fast as from memory
_BLOCK = 1 << 24  # the same on an accelerator, where it bounds the memory
_SIGN_BIT = -2139062144  # 0x80808080 as an int32: flips four int8 to their offset-binary form and back


def quantize_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of `weight [out, in]` to 127 levels a side: int8 `[out, in]` and float32 `[out, 1]`, with
    weight ≈ int8 · scale. A row of zeros has scale 1. On `weight`'s device, in float32."""
    levels = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
    rows = max(1, (_CPU_BLOCK if weight.device.type == "cpu" else _BLOCK) // weight.shape[1])
    for block, block_levels, block_scale in zip(weight.split(rows), levels.split(rows), scale.split(rows), strict=True):
        block = block.float()
        torch.div(block.abs().amax(dim=-1, keepdim=True), LEVELS, out=block_scale)
        block_scale.masked_fill_(block_scale == 0, 1)
        block_levels.copy_((block / block_scale).round_())
    return levels, scale


def pack_int8(weight: Tensor) -> Tensor:
    """int8 `[out, in]` → int32 `[out, in / 4]`: four input channels, the first in the lowest byte, each plus 128
    (compressed-tensors' `pack-quantized`). `in` must be a multiple of 4."""
    return weight.contiguous().view(torch.int32) ^ _SIGN_BIT


def unpack_int8(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of `pack_int8`: int8 `[out, in_features]`."""
    return (packed.contiguous() ^ _SIGN_BIT).view(torch.int8)[..., :in_features]
