"""Units of a network that share a scale, their scales, and the tensors they are written as"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import Shape
from hunyuan_vllm.quant.rounding import E4M3_MAX
from hunyuan_vllm.quantize.calibrate import LayerStats
from hunyuan_vllm.quantize.formats import Scheme, Spec
from hunyuan_vllm.quantize.smooth import Migration
from hunyuan_vllm.quantize.units import Unit, input_of, place


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


def specs_of(unit: Unit, scheme: Scheme, shapes: dict[str, Shape], dtype: Callable[[str], torch.dtype]) -> list[Spec]:
    """The tensors that will be written for a unit, known without reading it.

    Args:
        shapes: of every canonical tensor of the source.
        dtype: of a canonical tensor of the source.
    """
    if not unit.quantised:
        return [Spec(name, dtype(name), shapes[name]) for name in unit.names]
    specs = [spec for name in unit.names for spec in scheme.specs(name.removesuffix(".weight"), shapes[name])]
    if scheme.static_inputs and (owner := _owned_cache(unit)):
        specs += [Spec(f"{owner}.{part}_scale", torch.float32, ()) for part in "kv"]
    return specs


class Encoder:
    """Makes the tensors of a unit.

    Args:
        read: a canonical tensor as it is to be represented: the checkpoint's, after migration.
        activations: what calibration saw; needed by a scheme with static input scales.
        device: where the arithmetic runs.
    """

    def __init__(
        self,
        scheme: Scheme,
        clip: str,
        read: Callable[[str], Tensor],
        activations: ActivationScales | None,
        device: str,
    ) -> None:
        self._scheme, self._clip, self._read = scheme, clip, read
        self._activations, self._device = activations, device

    def tensors(self, unit: Unit) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) as `specs_of` says."""
        if not unit.quantised:
            yield from ((name, self._read(name)) for name in unit.names)
            return
        weights = [self._read(name).to(self._device) for name in unit.names]
        for name, stored in zip(unit.names, self._scheme.encode(weights, self._clip), strict=True):
            projection = name.removesuffix(".weight")
            for part, tensor in stored.items():
                yield f"{projection}.{part}", tensor
        if self._scheme.static_inputs:
            assert self._activations is not None
            yield from static_scales(unit, self._activations)


def static_scales(unit: Unit, activations: ActivationScales) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the scales of a quantised unit that come from calibration."""
    for name in unit.names:
        projection = name.removesuffix(".weight")
        yield f"{projection}.input_scale", activations.input_scale(*place(projection))
    if owner := _owned_cache(unit):
        k_scale, v_scale = activations.cache_scales(place(owner)[0])
        yield f"{owner}.k_scale", k_scale
        yield f"{owner}.v_scale", v_scale


def _owned_cache(unit: Unit) -> str | None:
    """The attention whose cache holds what a unit projects; None unless it projects to K and V."""
    stems = [name.removesuffix(".v_proj.weight") for name in unit.names if name.endswith(".v_proj.weight")]
    return stems[0] if stems else None
