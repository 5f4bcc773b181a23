"""FP8 checkpoints on disk, as AutoFP8 and our converter write them: which tensors there are, under which names.

Every linear that is not ignored has an E4M3 `weight`, a `weight_scale` and an `input_scale`, one number each. KV-cache
scales may be there too, in any of several spellings. No vLLM is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError, Layout, Shape, expected_tensors
from hunyuan_vllm.quant.ignored import IgnoredLayers, quantised_linears

__all__ = ["E4M3_NAME", "Fp8Layout", "IgnoredLayers", "ignored_layers", "is_static_per_tensor"]

E4M3_NAME = "F8_E4M3"  # as safetensors' headers spell it
SCALAR: Shape = ()

_FUSED_SCALE = re.compile(r"^(.*\.)(qkv_proj|gate_and_up_proj)\.(weight_scale|input_scale)$")
_FUSED_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_and_up_proj": ("up_proj", "gate_proj")}
_CACHE_SCALE = re.compile(r"^(.*\.self_attn\.)(?:attn\.)?(kv|k|v)_scale$")
_OUTPUT_SCALE = re.compile(r"^(.*\.self_attn\.)(k|v)_proj\.output_scale$")


def is_static_per_tensor(quantization: Mapping[str, Any]) -> bool:
    """Whether config.json's quantization_config describes this layout: one scale a tensor, activations' included."""
    return (
        quantization.get("quant_method") == "fp8"
        and quantization.get("activation_scheme") == "static"
        and not quantization.get("weight_block_size")
    )


def ignored_layers(quantization: Mapping[str, Any]) -> IgnoredLayers:
    """What a quantization_config leaves unquantised, in either of the fields that say so."""
    return IgnoredLayers(quantization.get("ignored_layers") or quantization.get("modules_to_not_convert") or [])


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
        attentions = [f"model.layers.{layer}.self_attn." for layer in range(config.num_hidden_layers)]
        kinds = ("kv_scale", "k_scale", "v_scale")
        super().__init__(config, expected, {f"{attn}{kind}": SCALAR for attn in attentions for kind in kinds})

    def parts(self, name: str) -> tuple[str, ...]:
        if match := _FUSED_SCALE.match(name):
            parts = tuple(f"{match[1]}{part}.{match[3]}" for part in _FUSED_PARTS[match[2]])
            if all(part in self.known for part in parts):
                return parts
        if match := _CACHE_SCALE.match(name) or _OUTPUT_SCALE.match(name):
            name = f"{match[1]}{match[2]}_scale"
        return super().parts(name)

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
