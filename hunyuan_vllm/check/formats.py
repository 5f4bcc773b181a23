"""The formats a checkpoint may be stored in: how a config says so, which tensors there are, and of which types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import Layout
from hunyuan_vllm.quant import fp8_format, int8_format
from hunyuan_vllm.quant.ignored import IgnoredLayers

__all__ = ["FLOATS", "Format", "is_scale", "stored_format", "types_of"]

FLOATS = ("BF16", "F16", "F32")
FP8 = "fp8"
NAMES = {
    None: "unquantised",
    FP8: "FP8 weights and activations, one scale a tensor",
    int8_format.PACKED: "int8 weights, packed, one scale an output channel",
    int8_format.PLAIN: "int8 weights and activations, one scale an output channel",
}
TYPES = {"weight_packed": ("I32",), "weight_shape": ("I32", "I64")}


@dataclass(frozen=True)
class Format:
    """How a checkpoint stores its weights.

    Attributes:
        kind: `FP8`, int8_format's `PACKED` or `PLAIN`, or None: unquantised.
        ignored: the projections that stay unquantised, as the checkpoint's config lists them.
    """

    kind: str | None = None
    ignored: IgnoredLayers = field(default_factory=IgnoredLayers)

    @property
    def name(self) -> str:
        return NAMES[self.kind]

    def layout(self, config: HunYuanConfig) -> Layout:
        """Names and shapes of the tensors that must be there, and of those that may.

        Raises:
            CheckpointError: the list of ignored projections cannot be followed.
        """
        if self.kind is None:
            return Layout(config)
        if self.kind == FP8:
            return fp8_format.Fp8Layout(config, self.ignored)
        return int8_format.Int8Layout(config, self.kind, self.ignored)

    def quantised_type(self) -> str:
        """The type of a quantised weight that keeps its name."""
        return fp8_format.E4M3_NAME if self.kind == FP8 else "I8"


def types_of(name: str, format: Format, layout: Layout) -> tuple[str, ...]:
    """The types, as safetensors names them, that a canonical tensor may have."""
    stem, _, kind = name.rpartition(".")
    if kind == "weight" and f"{stem}.weight_scale" in layout.known:
        return (format.quantised_type(),)
    return TYPES.get(kind, FLOATS)


def is_scale(name: str) -> bool:
    """Whether a tensor holds scales of a quantised weight, of activations or of a KV cache."""
    return name.endswith("_scale")


def stored_format(quantization: Mapping[str, Any] | None) -> Format | None:
    """The format that config.json's quantization_config describes; None if it is none of ours."""
    if not quantization:
        return Format()
    if fp8_format.is_static_per_tensor(quantization):
        return Format(FP8, fp8_format.ignored_layers(quantization))
    form = int8_format.recognise(quantization)
    return Format(form, IgnoredLayers(quantization.get("ignore") or ())) if form else None
