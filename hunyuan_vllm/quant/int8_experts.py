"""Experts with int8 weights on CPUs."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported
from vllm.model_executor.utils import replace_parameter, set_weight_attrs

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig

__all__ = ["Int8ExpertsMethod"]


class Int8ExpertsMethod(FusedMoEMethodBase):
    """`w13_weight` int8 `[experts, 2 · intermediate, hidden]` (gate's rows first), `w2_weight` int8 `[experts, hidden,
    intermediate]`, and their float32 scales `[experts, rows, 1]`; after loading as `kernels` wants them.

    Args:
        kernels: `hunyuan_vllm.quant.cpu.w8a16` or `.w8a8`.
    """

    def __init__(self, moe: FusedMoEConfig, kernels: ModuleType) -> None:
        super().__init__(moe)
        self.kernels = kernels

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: object,
    ) -> None:
        width = intermediate_size_per_partition
        for name, rows, columns in (("w13", 2 * width, hidden_size), ("w2", hidden_size, width)):
            weight = torch.empty(num_experts, rows, columns, dtype=torch.int8)
            scale = torch.empty(num_experts, rows, 1, dtype=torch.float32)
            self._register(layer, f"{name}_weight", weight, attributes)
            by_channel = {"quant_method": FusedMoeWeightScaleSupported.CHANNEL.value}
            self._register(layer, f"{name}_weight_scale", scale, attributes | by_channel)

    @staticmethod
    def _register(layer: nn.Module, name: str, data: Tensor, attributes: dict[str, object]) -> None:
        parameter = nn.Parameter(data, requires_grad=False)
        set_weight_attrs(parameter, attributes)
        layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        for name in ("w13", "w2"):
            weight = layer.get_parameter(f"{name}_weight").data
            scale = layer.get_parameter(f"{name}_weight_scale").data
            replace_parameter(layer, f"{name}_weight", self.kernels.pack_experts(weight))
            replace_parameter(layer, f"{name}_weight_scale", scale.squeeze(-1))

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
        return self.kernels.experts(
            x,
            layer.w13_weight,
            layer.w2_weight,
            layer.w13_weight_scale,
            layer.w2_weight_scale,
            topk_weights,
            topk_ids,
        )
