"""Routing on CPUs by two kernels of ours: a decode step's routing is all overhead, of which theirs is least.

vLLM's way is a conversion, oneDNN's product, a top-k and a kernel compiled for the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform

from hunyuan_vllm.native import operators

__all__ = ["NativeGate", "choose_experts", "routes_natively"]


def routes_natively() -> bool:
    """Whether the model that is being built routes by our kernels."""
    return current_platform.is_cpu() and torch.get_default_dtype() == torch.bfloat16 and operators.available()


class _KeptWeight(UnquantizedLinearMethod):
    """Leaves the weight as it is loaded: vLLM packs it for another kernel."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass


class NativeGate(GateLinear):
    """A router's linear: float32 logits `[tokens, experts]` of bfloat16 rows, with a float32 weight."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quant_method = _KeptWeight()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.ops.hunyuan_vllm.router_logits(x, self.weight), None


def choose_experts(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """vLLM's `custom_routing_function`: float32 weights and int32 ids, `[tokens, topk]`, by softmax."""
    return torch.ops.hunyuan_vllm.choose_experts(gating_output, topk, renormalize)
