"""Linear layers and experts with E4M3 weights and static scales"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod, Fp8MoEMethod
from vllm.model_executor.layers.quantization.utils.fp8_utils import (
    create_fp8_input_scale,
    create_fp8_scale_parameter,
    create_fp8_weight_parameter,
    process_fp8_input_tensor_strategy_moe,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticChannelSym
from vllm.model_executor.parameter import PerTensorScaleParameter
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from hunyuan_vllm.cpu_kernels import EXPERTS, LINEAR
from hunyuan_vllm.quant.base import add_parameter
from hunyuan_vllm.quant.cpu_fp8 import fits_fp8, fp8_experts, fp8_linear, prepare_fp8
from hunyuan_vllm.quant.rounding import E4M3

_ALIGNMENT = 16  # of both dimensions, for FP8 matrix products on CUDA


def linear_method(config: Fp8Config) -> LinearMethodBase:
    return CPUFp8LinearMethod() if current_platform.is_cpu() else CUDAFp8LinearMethod(config)


def _channel_scales(layer: Any) -> Tensor:
    """One weight scale an output channel, float32 `[out]`, from one a fused part."""
    widths = torch.tensor(layer.logical_widths, device=layer.weight_scale.device)
    return layer.weight_scale.data.repeat_interleave(widths, output_size=sum(layer.logical_widths))


@register_weight_loader_v2_supported_method
class CUDAFp8LinearMethod(Fp8LinearMethod):
    """vLLM's method, whose kernels are chosen by its own selection, without requantisation.

    Fused projections ask for a kernel with one scale per output channel; so do widths that FP8 products cannot have,
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
    """The same parameters; the same numbers, or with AMX those of rows that are not rounded."""

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
        weight, dtype = layer.weight.data, layer.orig_dtype
        replace_parameter(layer, "weight", prepare_fp8(weight, dtype, fits_fp8(LINEAR, dtype, *weight.shape)))
        replace_parameter(layer, "weight_scale", _channel_scales(layer))
        replace_parameter(layer, "input_scale", layer.input_scale.data.max())

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return fp8_linear(x, layer.weight, layer.weight_scale, layer.input_scale, bias)


def experts_method(config: Fp8Config, layer: RoutedExperts) -> FusedMoEMethodBase:
    return CPUFp8ExpertsMethod(layer.moe_config) if current_platform.is_cpu() else CUDAFp8ExpertsMethod(config, layer)


def share_scales(layer: Any) -> None:
    """Give each expert one scale for gate and up, exactly: `w13_weight_scale` `[experts, 2]` becomes `[experts]`.

    silu(gate) ⊙ up is linear in up. So up may count in gate's scale, which makes the product 1/r of what it is, with
    r = up's scale / gate's, if w2's input scale is divided by r and its weight scale multiplied: w2 then sees the same
    E4M3 values and returns the same. The weights stay as they are.

    Args:
        layer: a `RoutedExperts` with the parameters that `CPUFp8ExpertsMethod` creates.
    """
    gate, up = layer.w13_weight_scale.data.unbind(dim=1)
    ratio = up / gate
    replace_parameter(layer, "w13_weight_scale", gate.contiguous())
    replace_parameter(layer, "w2_weight_scale", layer.w2_weight_scale.data * ratio)
    replace_parameter(layer, "w2_input_scale", layer.w2_input_scale.data / ratio)
    if hasattr(layer, "w13_bias"):
        width = layer.w13_bias.shape[1] // 2
        layer.w13_bias.data[:, width:] /= ratio.unsqueeze(1)


class CUDAFp8ExpertsMethod(Fp8MoEMethod):
    """vLLM's method, whose kernels are chosen by its own selection, without requantisation."""

    supports_pre_processed_weights = False

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        share_scales(layer)
        # The greatest over the experts: all pass through one quantisation of their inputs.
        w13_input_scale, w2_input_scale = process_fp8_input_tensor_strategy_moe(
            layer.w13_input_scale, layer.w2_input_scale, layer.moe_config.moe_parallel_config.enable_eplb
        )
        replace_parameter(layer, "w13_input_scale", w13_input_scale)
        replace_parameter(layer, "w2_input_scale", w2_input_scale)
        self._setup_kernel(
            layer,
            layer.w13_weight,
            layer.w2_weight,
            layer.w13_weight_scale,
            layer.w2_weight_scale,
            w13_input_scale,
            w2_input_scale,
        )


class CPUFp8ExpertsMethod(FusedMoEMethodBase):
    """The same parameters; the same numbers, or with AMX those of rows that are not rounded."""

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        width = intermediate_size_per_partition
        add_parameter(layer, "w13_weight", (num_experts, 2 * width, hidden_size), E4M3, attributes)
        add_parameter(layer, "w2_weight", (num_experts, hidden_size, width), E4M3, attributes)
        if self.moe.has_bias:
            add_parameter(layer, "w13_bias", (num_experts, 2 * width), params_dtype, attributes)
            add_parameter(layer, "w2_bias", (num_experts, hidden_size), params_dtype, attributes)
        for name in ("w13_input_scale", "w2_input_scale"):
            add_parameter(layer, name, (num_experts,), torch.float32, attributes)
        attributes |= {"quant_method": FusedMoeWeightScaleSupported.TENSOR.value}
        add_parameter(layer, "w13_weight_scale", (num_experts, 2), torch.float32, attributes)
        add_parameter(layer, "w2_weight_scale", (num_experts,), torch.float32, attributes)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        share_scales(layer)
        dtype = self.moe.in_dtype
        stays = not self.moe.has_bias and fits_fp8(EXPERTS, dtype, *layer.w2_weight.shape[1:])
        for name in ("w13", "w2"):
            weight = prepare_fp8(getattr(layer, f"{name}_weight").data, dtype, stays)
            replace_parameter(layer, f"{name}_weight", weight)
            replace_parameter(layer, f"{name}_input_scale", getattr(layer, f"{name}_input_scale").data.max())

    def get_fused_moe_quant_config(self, layer: nn.Module) -> FusedMoEQuantConfig | None:
        return None

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: object,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """`x [tokens, hidden]`, `topk_* [tokens, k]`; the shared experts are the caller's."""
        return fp8_experts(
            x,
            layer.w13_weight,
            layer.w2_weight,
            layer.w13_weight_scale,
            layer.w2_weight_scale,
            layer.w13_input_scale,
            layer.w2_input_scale,
            getattr(layer, "w13_bias", None),
            getattr(layer, "w2_bias", None),
            topk_weights,
            topk_ids,
        )
