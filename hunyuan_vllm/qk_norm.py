"""The query/key norms of one layer, with the key's weight folded into the query's.

RMSNorm factors: key_layernorm(k) = k̂ ⊙ w_k, where k̂ = k / rms(k) is the same for every layer of a CLA group. And
q · (k̂ ⊙ w_k) = (q ⊙ w_k) · k̂. So k̂ is cached once a group, without weight, and each layer normalises its queries
with w_q ⊙ w_k. Exact in real arithmetic, for owner and cross layers alike.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

__all__ = ["FoldedQueryNorm"]


class _FoldAfterLoading(QuantizeMethodBase):
    """vLLM's post-load hook: it also runs after dummy loading and after a layer-wise reload."""

    def create_weights(self, layer: nn.Module, *args: object, **kwargs: object) -> None:
        raise RuntimeError("FoldedQueryNorm creates its own weights")

    def apply(self, layer: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("FoldedQueryNorm is applied by its forward")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        assert isinstance(layer, FoldedQueryNorm)
        layer.fold()


class FoldedQueryNorm(RMSNorm):
    """RMSNorm of queries, `[..., head_dim]`, by w_q ⊙ w_k.

    `query_weight` and `key_weight` (`[head_dim]`) are what a checkpoint holds and stay as loaded, so that either can
    be reloaded alone; `weight` is their product, taken in float32 and rounded once.
    """

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__(head_dim, eps)
        weight = self.weight.data
        del self.weight
        self.register_buffer("weight", weight)  # persistent: vLLM's layer-wise reload carries no others over
        self.query_weight = nn.Parameter(torch.ones_like(weight), requires_grad=False)
        self.key_weight = nn.Parameter(torch.ones_like(weight), requires_grad=False)
        self.quant_method = _FoldAfterLoading()

    @torch.no_grad()
    def fold(self) -> None:
        """Recompute `weight` in place, so that captured graphs keep seeing it."""
        self.weight.copy_(self.query_weight.float() * self.key_weight.float())

    def bound(self) -> float:
        """The most that |q| can be after this norm: every element of q / rms(q) is within ± sqrt(head_dim)."""
        return math.sqrt(self.hidden_size) * self.weight.abs().max().item()
