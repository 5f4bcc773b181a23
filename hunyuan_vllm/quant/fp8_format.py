"""FP8 checkpoints on disk with static scales: which tensors there are, under which names.

AutoFP8, our converter, compressed-tensors and ModelOpt write the same tensors and describe them differently. Every
linear layer that is not ignored has an E4M3 `weight`, a `weight_scale` and an `input_scale`, one number each. KV-cache
scales may be there too, in any of several spellings. No vLLM is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import translate
from typing import Any

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import FLOATS, CheckpointError, Layout, Shape, expected_tensors
from hunyuan_vllm.quant.ignored import IgnoredLayers, quantised_linears

__all__ = [
    "E4M3_NAME", "SCALAR", "Fp8Layout", "IgnoredLayers", "cache_scale", "cache_scales", "ignored_layers",
    "is_static_per_tensor", "modelopt",
]  # fmt: skip

E4M3_NAME = "F8_E4M3"  # as safetensors' headers spell it
SCALAR: Shape = ()

_FUSED_SCALE = re.compile(r"^(.*\.)(qkv_proj|gate_and_up_proj)\.(weight_scale|input_scale)$")
_FUSED_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_and_up_proj": ("up_proj", "gate_proj")}
_CACHE_SCALE = re.compile(r"^(.*\.self_attn\.)(?:attn\.)?(kv|k|v)_scale$")
_OUTPUT_SCALE = re.compile(r"^(.*\.self_attn\.)(k|v)_proj\.(?:output_scale|\2_scale)$")


def is_static_per_tensor(quantization: Mapping[str, Any]) -> bool:
    """Whether config.json's quantization_config describes this layout: one scale a tensor, activations' included."""
    method = quantization.get("quant_method")
    if method == "fp8":
        return quantization.get("activation_scheme") == "static" and not quantization.get("weight_block_size")
    if method == "compressed-tensors":
        groups = list((quantization.get("config_groups") or {}).values())
        static = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
        return (
            len(groups) == 1
            and groups[0].get("targets") == ["Linear"]
            and all(
                {"symmetric": True, "dynamic": False, **(groups[0].get(part) or {})}.items() >= static.items()
                for part in ("weights", "input_activations")
            )
        )
    return method == "modelopt" and str(modelopt(quantization).get("quant_algo")).upper() == "FP8"


def modelopt(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """ModelOpt's settings, which older releases keep a level deeper, in a file of their own."""
    return quantization.get("quantization") or quantization


def ignored_layers(quantization: Mapping[str, Any]) -> IgnoredLayers:
    """What a quantization_config leaves unquantised, in any of the fields that say so; ModelOpt's are wildcards."""
    entries: list[str] = []
    for field in ("ignored_layers", "modules_to_not_convert", "ignore", "exclude_modules"):
        entries += modelopt(quantization).get(field) or []
    return IgnoredLayers([f"re:{translate(entry)}" if entry.endswith("*") else entry for entry in entries])


def cache_scales(config: HunYuanConfig) -> list[str]:
    """Canonical names of the KV-cache scales that a checkpoint may have."""
    attentions = [f"model.layers.{layer}.self_attn." for layer in range(config.num_hidden_layers)]
    return [f"{attention}{kind}" for attention in attentions for kind in ("kv_scale", "k_scale", "v_scale")]


def cache_scale(name: str) -> str | None:
    """The canonical name of a KV-cache scale, in any of its spellings; None for another tensor."""
    match = _CACHE_SCALE.match(name) or _OUTPUT_SCALE.match(name)
    return f"{match[1]}{match[2]}_scale" if match else None


class Fp8Layout(Layout):
    """The tensors of an FP8 checkpoint. Scales have the shape `[]`, and may be stored as `[1]`.

    The canonical KV scales are `model.layers.N.self_attn.{kv_scale,k_scale,v_scale}`.

    Raises:
        CheckpointError: only a part of what the engine computes in one product is ignored.
    """

    def __init__(self, config: HunYuanConfig, ignored: IgnoredLayers) -> None:
        linears = quantised_linears(config, ignored)
        self.quantised = {f"{linear}.weight" for linear in linears}
        expected: dict[str, Shape] = {}
        for name, shape in expected_tensors(config).items():
            expected[name] = shape
            if name in self.quantised:
                linear = name.removesuffix(".weight")
                expected |= {f"{linear}.weight_scale": SCALAR, f"{linear}.input_scale": SCALAR}
        super().__init__(config, expected, dict.fromkeys(cache_scales(config), SCALAR))

    def parts(self, name: str) -> tuple[str, ...]:
        if match := _FUSED_SCALE.match(name):
            parts = tuple(f"{match[1]}{part}.{match[3]}" for part in _FUSED_PARTS[match[2]])
            if all(part in self.known for part in parts):
                return parts
        return super().parts(cache_scale(name) or name)

    def shape(self, parts: tuple[str, ...]) -> Shape:
        return SCALAR if self.known[parts[0]] == SCALAR else super().shape(parts)

    def names(self, name: str, shape: Iterable[int]) -> tuple[str, ...]:
        parts, shape = self.parts(name), tuple(shape)
        if not parts or self.shape(parts) != SCALAR:
            return super().names(name, shape)
        if shape not in (SCALAR, (1,)):
            raise CheckpointError(
                f"checkpoint tensor {name!r} has shape {list(shape)}; FP8 checkpoints have one scale a tensor, [] or "
                "[1]: convert the BF16 checkpoint with hunyuan-vllm quantize --scheme fp8-w8a8c8"
            )
        return parts

    def split(self, name: str, tensor: Any) -> list[tuple[str, Any]]:
        parts = self.names(name, tensor.shape)
        if parts and self.shape(parts) == SCALAR:
            return [(part, tensor.reshape(())) for part in parts]
        return super().split(name, tensor)

    def types(self, part: str) -> tuple[str, ...]:
        return (E4M3_NAME,) if part in self.quantised else FLOATS

    def check_type(self, name: str, dtype: str) -> None:
        for part in self.parts(name):
            if part in self.quantised and dtype != E4M3_NAME:
                raise CheckpointError(
                    f"checkpoint tensor {name!r} is {dtype} where quantization_config promises {E4M3_NAME}: add it to "
                    "ignored_layers if it was left unquantised"
                )
            if part not in self.quantised and dtype == E4M3_NAME:
                raise CheckpointError(
                    f"checkpoint tensor {name!r} is {dtype}, which the network needs unquantised, or which "
                    "ignored_layers in config.json says is unquantised"
                )
