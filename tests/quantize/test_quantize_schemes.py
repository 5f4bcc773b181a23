"""What a format's tensors stand for."""

from __future__ import annotations

import pytest
import torch

from hunyuan_vllm.quant.schemes import WRITTEN
from hunyuan_vllm.quantize.formats import FORMATS, Fp8


def test_every_fp8_value_is_expanded_exactly() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    decoded = Fp8().decode({"weight": values, "weight_scale": torch.tensor(0.5)})
    wanted = values.float() * 0.5
    assert torch.equal(decoded.nan_to_num(), wanted.nan_to_num()) and decoded.isnan().sum() == 2


@pytest.mark.parametrize("name", WRITTEN)
def test_decoding_is_the_inverse_of_encoding_up_to_half_a_step(name: str) -> None:
    scheme = FORMATS[name]
    weights = [torch.randn(300, 1024), torch.randn(40, 1024) * 5]  # more than one block of rows
    for weight, stored in zip(weights, scheme.encode(weights), strict=True):
        difference = (scheme.decode(stored) - weight).abs()
        half_step = scheme.half_step(weight, stored).expand_as(difference)
        assert (difference <= half_step * 1.0001).all() and (difference > half_step * 0.9).any()
        specs = {spec.name: spec for spec in scheme.specs("x", tuple(weight.shape))}
        for part, tensor in stored.items():
            assert (specs[f"x.{part}"].dtype, specs[f"x.{part}"].shape) == (tensor.dtype, tuple(tensor.shape))
