"""From a unit of the source to the tensors that are written for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hunyuan_vllm.layout import Shape
from hunyuan_vllm.quantize.scales import ActivationScales
from hunyuan_vllm.quantize.schemes import Scheme, Spec
from hunyuan_vllm.quantize.units import Unit, place

__all__ = ["Encoder", "specs_of", "static_scales"]


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
