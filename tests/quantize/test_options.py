"""The command's words, read and refused."""

from __future__ import annotations

import pytest

from hunyuan_vllm.quantize.convert import Options
from hunyuan_vllm.util.errors import UserError


def test_options_out_of_range() -> None:
    with pytest.raises(UserError, match="--smooth 1.5"):
        Options("int8", smooth=1.5)
    with pytest.raises(UserError, match="--headroom 0.5"):
        Options("fp8", headroom=0.5)
    with pytest.raises(UserError, match="--calibration-tokens 0"):
        Options("int8", calibration_tokens=0)


def test_only_what_needs_activations_calibrates() -> None:
    assert Options("fp8").calibrates and Options("int8", smooth=0.5).calibrates
    assert not Options("int8").calibrates and not Options("int8-w8a8").calibrates
