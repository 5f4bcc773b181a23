"""Scales of an FP8 KV cache: those a checkpoint brings, and those that are known without one.

Where keys are normalised, k̂ = k / rms(k) has |k̂| ≤ sqrt(head_dim), whatever the text: its scale needs no calibration,
and one that was calibrated on key_layernorm(k) does not apply to it. A group's one V has its owner's scale.
"""

from __future__ import annotations

import math
import re

from hunyuan_vllm.quant.fp8 import E4M3_MAX

__all__ = ["CacheScales", "is_cache_scale", "normalised_key_scale"]

_NAME = re.compile(r"^model\.layers\.(\d+)\.self_attn\.(kv|k|v)_scale$")


def is_cache_scale(name: str) -> bool:
    """Whether a canonical tensor is a KV-cache scale."""
    return _NAME.match(name) is not None


def normalised_key_scale(head_dim: int) -> float:
    """The E4M3 scale at which no k̂ saturates: the bound sqrt(head_dim) becomes 448."""
    return math.sqrt(head_dim) / E4M3_MAX


class CacheScales:
    """The KV scales of one checkpoint, by layer. A cross layer's own are never asked for."""

    def __init__(self) -> None:
        self._given: dict[tuple[int, str], float] = {}

    def keep(self, name: str, scale: float) -> None:
        """Remember the scale with this canonical name."""
        match = _NAME.match(name)
        assert match is not None
        self._given[int(match[1]), match[2]] = scale

    def k(self, layer: int) -> float | None:
        """The scale of an owner layer's K, or None; a `kv_scale` counts where there is no `k_scale`."""
        return self._of(layer, "k")

    def v(self, layer: int) -> float | None:
        """The same of its V."""
        return self._of(layer, "v")

    def _of(self, layer: int, which: str) -> float | None:
        return self._given.get((layer, which), self._given.get((layer, "kv")))
