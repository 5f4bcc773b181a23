"""Experts with E4M3 weights and static scales: vLLM's on CUDA, ours on CPUs.

vLLM's kernels take one scale for an expert's gate and up together, and one input scale for all experts. Gate and up
have scales of their own in a checkpoint; `share_scales` gets there without rounding a weight again, which vLLM does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod
from vllm.model_executor.layers.quantization.utils.fp8_utils import process_fp8_input_tensor_strategy_moe
from vllm.model_executor.utils import replace_parameter, set_weight_attrs
from vllm.platforms import current_platform

from hunyuan_vllm.quant.cpu import fp8 as cpu_fp8
from hunyuan_vllm.quant.fp8 import E4M3

__all__ = ["CPUFp8ExpertsMethod", "CUDAFp8ExpertsMethod", "method", "share_scales"]


def method(config: Fp8Config, layer: RoutedExperts) -> FusedMoEMethodBase:
    """The method for this platform."""
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
    """The same parameters and numbers, from weights expanded once."""

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
        self._register(layer, "w13_weight", (num_experts, 2 * width, hidden_size), E4M3, attributes)
        self._register(layer, "w2_weight", (num_experts, hidden_size, width), E4M3, attributes)
        if self.moe.has_bias:
            self._register(layer, "w13_bias", (num_experts, 2 * width), params_dtype, attributes)
            self._register(layer, "w2_bias", (num_experts, hidden_size), params_dtype, attributes)
        for name in ("w13_input_scale", "w2_input_scale"):
            self._register(layer, name, (num_experts,), torch.float32, attributes)
        attributes |= {"quant_method": FusedMoeWeightScaleSupported.TENSOR.value}
        self._register(layer, "w13_weight_scale", (num_experts, 2), torch.float32, attributes)
        self._register(layer, "w2_weight_scale", (num_experts,), torch.float32, attributes)

    @staticmethod
    def _register(
        layer: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        set_weight_attrs(parameter, attributes)
        layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        share_scales(layer)
        for name in ("w13", "w2"):
            expanded = cpu_fp8.expand(getattr(layer, f"{name}_weight").data, self.moe.in_dtype)
            replace_parameter(layer, f"{name}_weight", expanded)
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
        return cpu_fp8.experts(
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
