"""What a conversion is asked to do, read from the command's words and checked."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hunyuan_vllm.util.errors import UserError

CLIPS = ("max", "mse")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Options:
    """A conversion's options, beside its source and target.

    Attributes:
        scheme: a name of `quant.schemes.WRITTEN`.
        clip: the largest magnitude that a weight scale represents: "max", the largest weight's, or "mse", the one with
            the least squared error.
        smooth: SmoothQuant's α, from 0 (all difficulty stays in the activations) to 1; None for no migration.
        calibration_tokens: most tokens that calibration reads.
        headroom: how many times what calibration saw at most the static input and V scales reach. E4M3 rounds large and
            small numbers alike, so room costs nothing, whereas what lies beyond the range is cut off.
        shard_bytes: most bytes of a file, unless a tensor is larger.
        device: "cpu", "cuda" or "cuda:N": where the arithmetic runs.

    Raises:
        UserError: one is out of range.
    """

    scheme: str
    clip: str = "max"
    smooth: float | None = None
    calibration_tokens: int = 8192
    headroom: float = 2.0
    shard_bytes: int = 5 * 10**9
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.clip not in CLIPS:
            raise UserError(f"--clip {self.clip}: it is one of {', '.join(CLIPS)}")
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise UserError(f"--smooth {self.smooth:g}: it is a number from 0 to 1; 0.5 is usual")
        if self.calibration_tokens < 1:
            raise UserError(f"--calibration-tokens {self.calibration_tokens}: it is at least 1")
        if not 1 <= self.headroom <= 64:
            raise UserError(f"--headroom {self.headroom:g}: it is a number from 1 to 64; 2 is usual")

    @property
    def calibrates(self) -> bool:
        """Whether activations have to be seen before a weight can be written."""
        return self.scheme == "fp8" or self.smooth is not None


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or "1000000".

    Raises:
        UserError: `text` is no size of at least a kilobyte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
    if size < 1000:
        raise UserError(f"--shard-size {text}: it is a size such as 5GB or 500MB")
    return size
