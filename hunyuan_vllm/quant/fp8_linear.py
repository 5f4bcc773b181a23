"""Linear layers with E4M3 weights and static scales: vLLM's on CUDA, ours on CPUs.

The parts of a fused projection keep their own weight scales, as one scale an output channel. Rounding them again to a
common scale, which vLLM does, would double the squared rounding error of all parts but one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from vllm.model_executor.layers.quantization.utils.fp8_utils import (
    create_fp8_input_scale,
    create_fp8_scale_parameter,
    create_fp8_weight_parameter,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticChannelSym
from vllm.model_executor.parameter import PerTensorScaleParameter
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from hunyuan_vllm.quant.cpu import fp8 as cpu_fp8

__all__ = ["CPUFp8LinearMethod", "CUDAFp8LinearMethod", "method"]

_ALIGNMENT = 16  # of both dimensions, for FP8 matrix products on CUDA


def method(config: Fp8Config) -> LinearMethodBase:
    """The method for this platform."""
    return CPUFp8LinearMethod() if current_platform.is_cpu() else CUDAFp8LinearMethod(config)


def _channel_scales(layer: Any) -> Tensor:
    """One weight scale an output channel, float32 `[out]`, from one a fused part."""
    widths = torch.tensor(layer.logical_widths, device=layer.weight_scale.device)
    return layer.weight_scale.data.repeat_interleave(widths, output_size=sum(layer.logical_widths))


@register_weight_loader_v2_supported_method
class CUDAFp8LinearMethod(Fp8LinearMethod):
    """vLLM's method, whose kernels are chosen by its own selection, without requantisation.

    Fused projections ask for a kernel with one scale an output channel; so do widths that FP8 products cannot have,
    such as the 1144 columns of a rank of 16, because those kernels pad them with zeros.
    """

    supports_pre_processed_weights = False

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        widths = (input_size_per_partition, sum(output_partition_sizes))
        if len(output_partition_sizes) > 1 or any(width % _ALIGNMENT for width in widths):
            self.weight_quant_key = kFp8StaticChannelSym
        super().create_weights(layer, input_size_per_partition, output_partition_sizes, *args, **kwargs)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.use_marlin:  # FP8 weights alone, on GPUs without FP8 arithmetic; it keeps the parts' scales itself
            super().process_weights_after_loading(layer)
            return
        scale = layer.weight_scale.data.squeeze()
        if self.weight_quant_key == kFp8StaticChannelSym:
            scale = _channel_scales(layer).unsqueeze(1)
        replace_parameter(layer, "weight", layer.weight.data.t())
        replace_parameter(layer, "weight_scale", scale)
        replace_parameter(layer, "input_scale", layer.input_scale.data.max())
        self.fp8_linear.process_weights_after_loading(layer)


@register_weight_loader_v2_supported_method
class CPUFp8LinearMethod(LinearMethodBase):
    """The same parameters and numbers, from weights expanded once."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Any,
        **_: Any,
    ) -> None:
        layer.logical_widths = output_partition_sizes
        layer.orig_dtype = params_dtype
        outputs = sum(output_partition_sizes)
        weight = create_fp8_weight_parameter(outputs, input_size_per_partition, weight_loader)
        scale = create_fp8_scale_parameter(
            PerTensorScaleParameter, output_partition_sizes, input_size_per_partition, None, weight_loader
        )
        layer.register_parameter("weight", weight)
        layer.register_parameter("weight_scale", scale)
        layer.register_parameter("input_scale", create_fp8_input_scale(output_partition_sizes, weight_loader))

    def process_weights_after_loading(self, layer: Any) -> None:
        replace_parameter(layer, "weight", cpu_fp8.expand(layer.weight.data, layer.orig_dtype))
        replace_parameter(layer, "weight_scale", _channel_scales(layer))
        replace_parameter(layer, "input_scale", layer.input_scale.data.max())

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return cpu_fp8.linear(x, layer.weight, layer.weight_scale, layer.input_scale, bias)
