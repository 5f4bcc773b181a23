"""The scales that come from activations: of FP8 inputs and of the FP8 cache."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.quant.fp8 import E4M3_MAX
from hunyuan_vllm.quantize.observe import LayerStats
from hunyuan_vllm.quantize.smooth import Migration
from hunyuan_vllm.quantize.units import input_of

__all__ = ["ActivationScales"]


class ActivationScales:
    """Static E4M3 scales: `headroom` times what calibration saw at most, after migration, becomes 448.

    All experts of a layer share the scale of their gate and up inputs, and that of their down inputs, as the engine's
    fused experts need it: loading then rescales nothing.
    """

    def __init__(
        self,
        config: HunYuanConfig,
        stats: Callable[[int], LayerStats],
        migration: Migration | None = None,
        headroom: float = 1.0,
    ) -> None:
        self._config, self._stats, self._migration, self._headroom = config, stats, migration, headroom

    def amax(self, layer: int, projection: str) -> Tensor:
        """Largest magnitude of each input channel of a layer's projection, float32 `[in]`."""
        amax = self._stats(layer).inputs[_keeper(projection)]
        before = self._migration.inputs(layer, projection) if self._migration else None
        return amax if before is None else amax / before

    def sample(self, layer: int, projection: str) -> Tensor:
        """Some inputs, float32 `[tokens, in]`."""
        sample = self._stats(layer).samples[_keeper(projection)].float()
        before = self._migration.inputs(layer, projection) if self._migration else None
        return sample if before is None else sample / before

    def input_scale(self, layer: int, projection: str) -> Tensor:
        """float32 `[]`."""
        shared = input_of(projection)
        sharing = [name for name in self._stats(layer).inputs if input_of(name) == shared]
        return self._scale(max(float(self.amax(layer, name).max()) for name in sharing))

    def cache_scales(self, owner: int) -> tuple[Tensor, Tensor]:
        """An owner's K and V scale, float32 `[]`. With qk-norm the cache holds K / rms(K), which no channel can exceed
        sqrt(head_dim) of: that scale needs no calibration."""
        stats = self._stats(owner)
        assert stats.k_amax is not None and stats.v_amax is not None
        v_amax = stats.v_amax if self._migration is None else stats.v_amax / self._migration.value(owner)
        v_scale = self._scale(float(v_amax.max()))
        if self._config.use_qk_norm:
            return torch.tensor(math.sqrt(self._config.head_dim) / E4M3_MAX), v_scale
        return self._scale(float(stats.k_amax)), v_scale

    def _scale(self, amax: float) -> Tensor:
        return torch.tensor(self._headroom * amax / E4M3_MAX if amax > 0 else 1.0)


def _keeper(projection: str) -> str:
    """The projection under which the inputs of fused ones are kept."""
    for part, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
        if projection.endswith(part):
            return projection.removesuffix(part) + first
    return projection
