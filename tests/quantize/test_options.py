"""The command's words, read and refused."""

from __future__ import annotations

import pytest

from hunyuan_vllm.quantize.convert import Options
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.text import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("2 GiB", 2 << 30), ("1.5k", 1500), ("4096", 4096), ("1TB", 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "5 apples", "1I", "0GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="--shard-size"):
        parse_size(text)


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
