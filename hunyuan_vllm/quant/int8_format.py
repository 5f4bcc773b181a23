"""Int8 checkpoints on disk: compressed-tensors' `pack-quantized` (weights only) and `int-quantized` (activations too).

Both hold one float32 scale an output channel; the first keeps four weights in an int32, the second each in an int8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import FLOATS, CheckpointError, Layout, Shape, expected_tensors
from hunyuan_vllm.quant.ignored import IgnoredLayers, quantised_linears

__all__ = ["PACKED", "PLAIN", "Int8Layout", "describe", "recognise", "stored_tensors"]

PACKED = "pack-quantized"
PLAIN = "int-quantized"

_TYPES = {"weight": ("I8",), "weight_packed": ("I32",), "weight_scale": FLOATS, "weight_shape": ("I32", "I64")}


def describe(form: str, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint in `form`; `ignore` names the linears left as they were."""
    group = {
        "targets": ["Linear"],
        "weights": _arguments("channel", dynamic=False),
        "input_activations": _arguments("token", dynamic=True) if form == PLAIN else None,
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def recognise(config: Mapping[str, Any]) -> str | None:
    """The form a `quantization_config` describes, if it is one of ours; None for any other (4 bits, groups, …)."""
    groups = list((config.get("config_groups") or {}).values())
    others = ("kv_cache_scheme", "transform_config", "sparsity_config")
    if config.get("quant_method") != "compressed-tensors" or len(groups) != 1 or any(map(config.get, others)):
        return None
    (group,) = groups
    activations = group.get("input_activations")
    form = group.get("format") or config.get("format")
    if group.get("targets") != ["Linear"] or group.get("output_activations"):
        return None
    if not _matches(group.get("weights"), "channel", dynamic=False):
        return None
    if form == PACKED and activations is None:
        return PACKED
    if form == PLAIN and _matches(activations, "token", dynamic=True):
        return PLAIN
    return None


def stored_tensors(form: str, projection: str, shape: Shape) -> dict[str, Shape]:
    """Name → shape of what a checkpoint in `form` holds for the weight `[out, in]` of `projection`."""
    outputs, inputs = shape
    if form == PLAIN:
        return {f"{projection}.weight": shape, f"{projection}.weight_scale": (outputs, 1)}
    return {f"{projection}.weight_packed": (outputs, inputs // 4), f"{projection}.weight_scale": (outputs, 1)}


class Int8Layout(Layout):
    """The tensors of an int8 checkpoint in `form`; a packed one may also say its weights' shapes.

    Raises:
        CheckpointError: only a part of what the engine computes in one product is ignored.
    """

    def __init__(self, config: HunYuanConfig, form: str, ignored: IgnoredLayers) -> None:
        self.quantised = quantised_linears(config, ignored)
        expected: dict[str, Shape] = {}
        for name, shape in expected_tensors(config).items():
            linear = name.removesuffix(".weight")
            expected |= stored_tensors(form, linear, shape) if linear in self.quantised else {name: shape}
        packed = self.quantised if form == PACKED else ()
        super().__init__(config, expected, {f"{linear}.weight_shape": (2,) for linear in packed})

    def types(self, part: str) -> tuple[str, ...]:
        linear, _, kind = part.rpartition(".")
        return _TYPES[kind] if linear in self.quantised and kind != "bias" else FLOATS

    def check_type(self, name: str, dtype: str) -> None:
        for part in self.parts(name):
            if dtype not in (types := self.types(part)):
                raise CheckpointError(
                    f"checkpoint tensor {name!r} is {dtype} where config.json's quantization_config promises "
                    f"{' or '.join(types)}: copy the config.json that belongs to the checkpoint"
                )


def _arguments(strategy: str, dynamic: bool) -> dict[str, Any]:
    """compressed-tensors' `QuantizationArgs`."""
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": None,
        "dynamic": dynamic,
        "actorder": None,
        "observer": None if dynamic else "minmax",
    }


def _matches(arguments: Mapping[str, Any] | None, strategy: str, dynamic: bool) -> bool:
    wanted = _arguments(strategy, dynamic)
    del wanted["observer"]  # how scales were found is not ours to judge
    return arguments is not None and all(arguments.get(name) == value for name, value in wanted.items())
