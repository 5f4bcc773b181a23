"""Linear layers with int8 weights on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter
from vllm.model_executor.utils import replace_parameter

__all__ = ["Int8LinearMethod"]


@register_weight_loader_v2_supported_method
class Int8LinearMethod(LinearMethodBase):
    """`weight` int8 `[out, in]` and `weight_scale` float32 `[out, 1]` while loading; then as `kernels` wants them.

    Args:
        kernels: `hunyuan_vllm.quant.cpu.w8a16` or `.w8a8`.
    """

    def __init__(self, kernels: ModuleType) -> None:
        super().__init__()
        self.kernels = kernels

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable,
        **_: object,
    ) -> None:
        self.dtype = params_dtype
        outputs = sum(output_partition_sizes)
        weight = torch.empty(outputs, input_size_per_partition, dtype=torch.int8)
        layer.register_parameter(
            "weight", ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=weight_loader)
        )
        scale = torch.empty(outputs, 1, dtype=torch.float32)
        layer.register_parameter(
            "weight_scale", ChannelQuantScaleParameter(data=scale, output_dim=0, weight_loader=weight_loader)
        )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight, scale = layer.get_parameter("weight").data, layer.get_parameter("weight_scale").data
        replace_parameter(layer, "weight", self.kernels.pack_linear(weight, self.dtype))
        replace_parameter(layer, "weight_scale", scale.squeeze(-1))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.kernels.linear(x, layer.weight, layer.weight_scale, bias)
