"""Linear layers and experts with int8 weights, and the shared MLP as one more expert"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from hunyuan_vllm.cpu_kernels import EXPERTS, LINEAR, Kernel
from hunyuan_vllm.quant.base import add_parameter

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig

    from hunyuan_vllm.quant.cpu import Int8Kernels


@register_weight_loader_v2_supported_method
class Int8LinearMethod(LinearMethodBase):
    """`weight` int8 `[out, in]` and `weight_scale` float32 `[out, 1]` while loading; then as `kernels` wants them.

    Args:
        kernels: `quant.cpu.w8a16` or `quant.cpu.w8a8`.
    """

    def __init__(self, kernels: Int8Kernels) -> None:
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
        kernel = self.kernels.choose(LINEAR, self.dtype, *weight.shape)
        replace_parameter(layer, "weight", self.kernels.pack(weight, kernel))
        replace_parameter(layer, "weight_scale", scale.squeeze(-1))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.kernels.linear(x, layer.get_parameter("weight"), layer.get_parameter("weight_scale"), bias)


class Int8ExpertsMethod(FusedMoEMethodBase):
    """`w13_weight` int8 `[experts, 2 · intermediate, hidden]` (gate's rows first), `w2_weight` int8 `[experts, hidden,
    intermediate]`, and their float32 scales `[experts, rows, 1]`; after loading as `kernels` wants them.
    """

    def __init__(self, moe: FusedMoEConfig, kernels: Int8Kernels) -> None:
        super().__init__(moe)
        self.kernels = kernels
        self.shared_mlp: Any = None  # computed too, where there is one: see `join_shared_mlp`

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
        by_channel = attributes | {"quant_method": FusedMoeWeightScaleSupported.CHANNEL.value}
        for name, rows, columns in (("w13", 2 * width, hidden_size), ("w2", hidden_size, width)):
            add_parameter(layer, f"{name}_weight", (num_experts, rows, columns), torch.int8, attributes)
            add_parameter(layer, f"{name}_weight_scale", (num_experts, rows, 1), torch.float32, by_channel)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        kernel = self.kernels.choose(EXPERTS, self.moe.in_dtype, *layer.get_parameter("w2_weight").shape[1:])
        for name in ("w13", "w2"):
            weight = layer.get_parameter(f"{name}_weight").data
            scale = layer.get_parameter(f"{name}_weight_scale").data
            replace_parameter(layer, f"{name}_weight", self.kernels.pack(weight, kernel))
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
        """`x [tokens, hidden]`, `topk_* [tokens, k]`; vLLM's `shared_experts` are the caller's."""
        shared = None
        if self.shared_mlp is not None:
            first, second = self.shared_mlp.gate_up_proj, self.shared_mlp.down_proj
            shared = first.weight, second.weight, first.weight_scale, second.weight_scale
        return self.kernels.experts(
            x,
            layer.get_parameter("w13_weight"),
            layer.get_parameter("w2_weight"),
            layer.get_parameter("w13_weight_scale"),
            layer.get_parameter("w2_weight_scale"),
            topk_weights,
            topk_ids,
            shared,
        )


def computes_shared_mlp(quant_config: QuantizationConfig | None, experts: str, width: int, shared_mlp: Any) -> bool:
    """Whether the experts that are built next are to compute `shared_mlp` too; then vLLM must not.

    Args:
        width: their intermediate size on this rank, which the shared MLP's must equal.
    """
    from hunyuan_vllm.quant.int8 import Int8Config

    if not isinstance(quant_config, Int8Config) or shared_mlp is None or not current_platform.is_cpu():
        return False
    first, second = shared_mlp.gate_up_proj, shared_mlp.down_proj
    for linear in (first, second):
        if not isinstance(linear.quant_method, Int8LinearMethod) or linear.bias is not None:
            return False
    if quant_config.ignored.covers(experts) or second.input_size_per_partition != width:
        return False
    # Our kernel has to have both, or it could not read the shared expert's weights.
    kernels, dtype = second.quant_method.kernels, torch.get_default_dtype()
    hidden = second.output_size_per_partition
    shapes = ((EXPERTS, (hidden, width)), (LINEAR, (2 * width, hidden)), (LINEAR, (hidden, width)))
    return all(kernels.choose(layer, dtype, *shape) is Kernel.OURS for layer, shape in shapes)


def join_shared_mlp(experts: Any, shared_mlp: nn.Module) -> None:
    """Hand it over, where `computes_shared_mlp` said so."""

    method = experts.routed_experts.quant_method
    assert isinstance(method, Int8ExpertsMethod)
    method.shared_mlp = shared_mlp
