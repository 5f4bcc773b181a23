"""`hunyuan_int8` and `hunyuan_int8_w8a8`: the quantisations as vLLM knows them, and what their loading does.

The checkpoint is BF16, quantised tensor by tensor as it streams in, or already int8. On CUDA the layers are vLLM's own
for compressed-tensors; on CPUs they are those of `int8_layers.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.platforms import current_platform

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError, Layout
from hunyuan_vllm.quant.base import HunYuanQuantization
from hunyuan_vllm.quant.formats import PACKED, PLAIN
from hunyuan_vllm.quant.layouts import IgnoredLayers, is_quantised
from hunyuan_vllm.quant.quantization_config import describe, ignored_layers, int8, int8_form
from hunyuan_vllm.quant.rounding import pack_int8, quantize_per_channel, unpack_int8
from hunyuan_vllm.quant.schemes import INT8, INT8_W8A8

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    from hunyuan_vllm.quant.cpu import Int8Kernels


class Int8Config(HunYuanQuantization):
    """Weights in int8, activations as they are.

    Args:
        stored: how the checkpoint holds its weights: `PACKED`, `PLAIN`, or None for BF16 (or another float type).
    """

    name: ClassVar[str] = str(INT8.quantization)
    form: ClassVar[str] = PACKED
    """The format of quantised checkpoints that ask for this method, and of vLLM's parameters for it on CUDA."""

    def __init__(self, stored: str | None = None, ignored: IgnoredLayers | None = None) -> None:
        super().__init__()
        self.stored = stored
        self.ignored = ignored or IgnoredLayers()

    # What vLLM asks of a quantisation.

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Int8Config:
        return cls(int8_form(config), ignored_layers(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Takes over a Hunyuan checkpoint in this method's format; and one in the other's, if the user names this."""
        stored = int8_form(hf_quant_cfg)
        if stored is None or not isinstance(hf_config, HunYuanConfig):
            return None
        wanted = cls.name if user_quant is None and stored == cls.form else user_quant
        return cls.name if wanted == cls.name else None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        if not isinstance(layer, LinearBase | RoutedExperts):
            return None
        if self.ignored.covers(prefix):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if not current_platform.is_cpu():
            if isinstance(layer, RoutedExperts) and self.form == PACKED:
                _prefer_marlin(layer.moe_config)
            return self._upstream.get_quant_method(layer, prefix)
        from hunyuan_vllm.quant.int8_layers import Int8ExpertsMethod, Int8LinearMethod

        if isinstance(layer, LinearBase):
            return Int8LinearMethod(self._kernels)
        return Int8ExpertsMethod(layer.moe_config, self._kernels)

    # What the loader asks.

    def layout(self, config: HunYuanConfig) -> Layout:
        return Layout(config) if self.stored is None else int8(self.stored, self.ignored).layout(config)

    def load(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        linear, _, kind = name.rpartition(".")
        if not is_quantised(f"{linear}.weight") or kind == "bias" or linear in self.ignored:
            yield name, tensor
        elif kind == "weight_scale":
            yield name, _checked_scale(name, tensor)
        elif kind == "weight_packed":
            packed = _of_type(name, tensor, torch.int32)
            yield from self._weight(linear, unpack_int8(packed, 4 * packed.shape[1]))
        elif kind == "weight" and self.stored == PLAIN:
            yield from self._weight(linear, _of_type(name, tensor, torch.int8))
        elif kind == "weight":
            weight = _of_type(name, tensor, torch.bfloat16, torch.float16, torch.float32)
            values, scale = quantize_per_channel(weight.to(current_platform.device_type))
            yield from self._weight(linear, values)
            yield f"{linear}.weight_scale", scale

    def _weight(self, projection: str, values: Tensor) -> Iterable[tuple[str, Tensor]]:
        """int8 `[out, in]` as the layers' parameters hold it."""
        if self.form == PLAIN or current_platform.is_cpu():
            yield f"{projection}.weight", values
        else:
            yield f"{projection}.weight_packed", pack_int8(values)
            yield f"{projection}.weight_shape", torch.tensor(values.shape)

    # Between the two.

    @property
    def _kernels(self) -> Int8Kernels:
        from hunyuan_vllm.quant.cpu import w8a16

        return w8a16

    @cached_property
    def _upstream(self) -> QuantizationConfig:
        """vLLM's own config for the same quantisation."""
        from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
            CompressedTensorsConfig,
        )

        return CompressedTensorsConfig.from_config(describe(self.form))


class Int8W8A8Config(Int8Config):
    """Weights in int8, and activations too: rounded while computing, with one scale a token."""

    name = str(INT8_W8A8.quantization)
    form = PLAIN

    @property
    def _kernels(self) -> Int8Kernels:
        from hunyuan_vllm.quant.cpu import w8a8

        return w8a8


def _prefer_marlin(experts: FusedMoEConfig) -> None:
    """Choose Marlin's kernel where vLLM would choose by itself.

    Of its kernels for experts with int8 weights only Marlin's takes one scale per output channel. At compute capability
    9.0 vLLM 0.32 and 0.33 prefer Humming's, and then fail. A batched format has a Marlin kernel of another name.
    """
    if experts.moe_backend == "auto" and not experts.moe_parallel_config.use_batched_activation_format:
        experts.moe_backend = "marlin"


def _of_type(name: str, tensor: Tensor, *types: torch.dtype) -> Tensor:
    if tensor.dtype not in types:
        raise CheckpointError(
            f"checkpoint tensor {name!r} is {tensor.dtype} and should be {' or '.join(map(str, types))}: "
            "copy the config.json that belongs to the checkpoint"
        )
    return tensor


def _checked_scale(name: str, scale: Tensor) -> Tensor:
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CheckpointError(f"checkpoint tensor {name!r} holds scales that are not positive numbers")
    return scale
