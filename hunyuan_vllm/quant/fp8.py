"""E4M3 rounding with one scale a tensor: what FP8 weights, activations and caches go through.

An FP8 tensor stands for `values * scale`. Pure torch, on any device and in any order of calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["E4M3", "E4M3_MAX", "quantize_per_tensor", "round_through_fp8"]

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # the largest finite value; quantisation saturates there, where a plain cast may give NaN
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # a subnormal one would flush to zero on some devices


def quantize_per_tensor(x: Tensor, scale: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
    """E4M3 values in the shape of `x`, and their scale, float32 `[]`.

    Without `scale` it is max |x| / 448, which uses the whole range, or 1 for a tensor of zeros. Values beyond
    448 * scale saturate. As vLLM's kernels do, `x` is multiplied by the scale's reciprocal, in float32.
    """
    if scale is None:
        amax = x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)
        scale = torch.where(amax > 0, (amax / E4M3_MAX).clamp(min=_SMALLEST_SCALE), torch.ones_like(amax))
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device).reshape(())
    return (x.float() * scale.reciprocal()).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def round_through_fp8(x: Tensor, scale: Tensor | float) -> Tensor:
    """The nearest values to `x` that an E4M3 tensor of this scale can stand for, in `x`'s dtype."""
    values, scale = quantize_per_tensor(x, scale)
    return (values.float() * scale).to(x.dtype)
