"""Rounding to int8 with a scale per output channel, and to E4M3 with a scale per tensor"""

import torch
from torch import Tensor

INT8_MAX = 127  # -128 stays unused, so that the range is symmetric
_CPU_BLOCK = 1 << 19  # weights expanded to float32 at a time: from a core's cache, several times as fast as from memory
_BLOCK = 1 << 24  # the same on an accelerator, where it bounds the memory
_SIGN_BIT = -2139062144  # 0x80808080 as an int32: flips four int8 to their offset-binary form and back


def quantize_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of `weight [out, in]` to -127…127: int8 `[out, in]` and float32 `[out, 1]`, with
    weight ≈ int8 · scale. A row of zeros has scale 1. On `weight`'s device, in float32."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
    rows = max(1, (_CPU_BLOCK if weight.device.type == "cpu" else _BLOCK) // weight.shape[1])
    for block, block_values, block_scale in zip(weight.split(rows), values.split(rows), scale.split(rows), strict=True):
        block = block.float()
        torch.div(block.abs().amax(dim=-1, keepdim=True), INT8_MAX, out=block_scale)
        block_scale.masked_fill_(block_scale == 0, 1)
        block_values.copy_((block / block_scale).round_())
    return values, scale


def pack_int8(weight: Tensor) -> Tensor:
    """int8 `[out, in]` → int32 `[out, in / 4]`: four input channels, the first in the lowest byte, each plus 128
    (compressed-tensors' `pack-quantized`). `in` must be a multiple of 4."""
    return weight.contiguous().view(torch.int32) ^ _SIGN_BIT


def unpack_int8(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of `pack_int8`: int8 `[out, in_features]`."""
    return (packed.contiguous() ^ _SIGN_BIT).view(torch.int8)[..., :in_features]


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
