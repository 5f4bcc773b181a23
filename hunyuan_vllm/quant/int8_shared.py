"""A layer's shared MLP as one more expert of the int8 experts' kernel on CPUs, where starting a product costs most."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.platforms import current_platform

__all__ = ["computes_shared_mlp", "join_shared_mlp"]


def computes_shared_mlp(quant_config: QuantizationConfig | None, experts: str, width: int, shared_mlp: Any) -> bool:
    """Whether the experts that are built next are to compute `shared_mlp` too; then vLLM must not.

    Args:
        experts: their prefix.
        width: their intermediate size on this rank, which the shared MLP's must equal.
    """
    from hunyuan_vllm.native import operators
    from hunyuan_vllm.quant.int8_config import Int8Config

    if not isinstance(quant_config, Int8Config) or shared_mlp is None or not current_platform.is_cpu():
        return False
    if torch.get_default_dtype() != torch.bfloat16 or not operators.available():
        return False
    from hunyuan_vllm.quant.int8_linear import Int8LinearMethod

    linears = (shared_mlp.gate_up_proj, shared_mlp.down_proj)
    quantised = all(isinstance(linear.quant_method, Int8LinearMethod) and linear.bias is None for linear in linears)
    return quantised and not quant_config.ignored.covers(experts) and linears[1].input_size_per_partition == width


def join_shared_mlp(experts: Any, shared_mlp: nn.Module) -> None:
    """Hand it over, where `computes_shared_mlp` said so."""
    from hunyuan_vllm.quant.int8_experts import Int8ExpertsMethod

    method = experts.routed_experts.quant_method
    assert isinstance(method, Int8ExpertsMethod)
    method.shared_mlp = shared_mlp
