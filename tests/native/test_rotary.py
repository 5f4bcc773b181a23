"""The kernel of rotary embedding and norm against the same in float64."""

import pytest
import torch

from hunyuan_vllm.native import operators

pytestmark = pytest.mark.skipif(not operators.available(), reason="needs a CPU and a compiler for the C++ kernels")


@pytest.mark.parametrize("size", [128, 80, 32, 6, 2])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 1), (8, 8), (1, 0)])
def test_rotated_and_normalised(size: int, heads: int, key_heads: int) -> None:
    generator = torch.Generator().manual_seed(size)
    weight, eps = torch.randn(size, generator=generator).bfloat16(), 1e-3
    angles = torch.rand(50, size // 2, generator=generator)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).bfloat16()
    cos, sin = cos_sin.double().unsqueeze(1).chunk(2, dim=-1)
    for tokens in (0, 1, 3, 200):
        positions = torch.randint(50, (tokens,), generator=generator)
        rows = torch.randn(tokens, (heads + key_heads + 2) * size, generator=generator).bfloat16()
        rows[: tokens // 2] = 0  # which a norm must not divide by
        qk = rows[:, : (heads + key_heads) * size]
        q, k = torch.ops.hunyuan_vllm.rotate_and_normalize(qk, positions, cos_sin, weight, heads, key_heads, eps)
        first, second = qk.double().view(tokens, heads + key_heads, size).chunk(2, dim=-1)
        c, s = cos[positions], sin[positions]
        rotated = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
        rotated /= (rotated.square().mean(-1, keepdim=True) + eps).sqrt()
        expected = (rotated[:, :heads] * weight.double()).flatten(1), rotated[:, heads:].flatten(1)
        for result, wanted in zip((q, k), expected, strict=True):
            assert result.dtype == torch.bfloat16 and result.is_contiguous()
            torch.testing.assert_close(result.double(), wanted, rtol=5e-3, atol=1e-5)
