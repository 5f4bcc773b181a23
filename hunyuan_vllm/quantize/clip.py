"""Where a weight scale's range ends: at the largest weight, or where the squared error is least.

A per-tensor choice looks at every weight through a histogram: bfloat16 has only 32,768 magnitudes, so it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from hunyuan_vllm.quant.fp8 import E4M3_MAX, round_through_fp8
from hunyuan_vllm.quant.int8 import LEVELS
from hunyuan_vllm.quantize.blocks import in_blocks

__all__ = ["row_scales", "tensor_scale"]

MAGNITUDES = 1 << 15
# An FP8 grid repeats itself at every power of two: one above the plain scale, where all weights may fall on a finer
# part of it, and below as many as an outlier may be worth giving up for.
FP8_STEPS, FP8_POWERS = 32, range(-12, 2)
INT8_SHRINKS = [1 - 0.025 * step for step in range(29)]  # of the largest weight of a row, down to 0.3


def tensor_scale(weights: Iterable[Tensor], clip: str) -> float:
    """One E4M3 scale for all of `weights` together, any shapes; 1 where all are zero."""
    if clip == "max":
        return (max(float(_amax(weight)) for weight in weights) / E4M3_MAX) or 1.0
    counts = torch.stack([_histogram(weight) for weight in weights]).sum(0)
    magnitudes = torch.arange(MAGNITUDES, dtype=torch.int16).view(torch.bfloat16).float()
    used = counts.nonzero()[:, 0]
    counts, magnitudes = counts[used], magnitudes[used]
    if not magnitudes[-1]:
        return 1.0
    return _least_error(magnitudes, counts.double())


def row_scales(weight: Tensor, clip: str) -> Tensor:
    """An int8 scale for each row of `weight [out, in]`, float32 `[out, 1]`; 1 for a row of zeros."""
    chosen = torch.cat(in_blocks(weight, lambda rows: _largest(weight[rows].float(), clip)))
    scale = chosen / LEVELS
    return torch.where(scale == 0, 1.0, scale)


def _largest(rows: Tensor, clip: str) -> Tensor:
    """The largest magnitude of each row that is still to be represented, `[rows, 1]`."""
    magnitudes = rows.abs()
    amax = magnitudes.amax(dim=1, keepdim=True)
    if clip == "max":
        return amax
    best, least = amax, torch.full_like(amax, math.inf)
    for shrink in INT8_SHRINKS:
        scale = torch.where(amax == 0, 1.0, amax * shrink / LEVELS)
        levels = (magnitudes / scale).round_().clamp_(max=LEVELS)
        error = levels.mul_(scale).sub_(magnitudes).square_().sum(dim=1, keepdim=True)
        best = torch.where(error < least, amax * shrink, best)
        least = torch.minimum(error, least)
    return best


def _least_error(magnitudes: Tensor, counts: Tensor) -> float:
    widest = float(magnitudes[-1]) / E4M3_MAX
    steps = range(FP8_STEPS * FP8_POWERS.start, FP8_STEPS * (FP8_POWERS.stop - 1))
    scales = [widest * 2.0 ** (step / FP8_STEPS) for step in steps]
    errors = [((round_through_fp8(magnitudes, s) - magnitudes).double().square() * counts).sum().item() for s in scales]
    return scales[errors.index(min(errors))]


def _amax(weight: Tensor) -> Tensor:
    least, most = weight.aminmax()
    return torch.maximum(-least, most)


def _histogram(weight: Tensor) -> Tensor:
    """How often each bfloat16 magnitude occurs, int64 `[32768]`, on the CPU."""

    def count(rows: slice) -> Tensor:
        bits = weight[rows].bfloat16().view(torch.int16).bitwise_and(MAGNITUDES - 1)
        return bits.flatten().bincount(minlength=MAGNITUDES)

    return torch.stack(in_blocks(weight, count)).sum(0).cpu()
