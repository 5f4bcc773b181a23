"""The int8 products as operators of torch, which torch.compile calls without looking into them; and what they take.

A weight is packed once and is then opaque: only the product of the same module can read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor

__all__ = ["Experts", "Linear", "define_experts", "define_linear"]

_LIBRARY = torch.library.Library("hunyuan_vllm", "FRAGMENT")


class Linear(Protocol):
    def __call__(self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        """x · (scale ⊙ weight)ᵀ + bias, `[tokens, out]` in x's type.

        Args:
            x: `[tokens, in]`.
            packed: from `pack_linear`, of int8 `[out, in]`.
            scale: float32 `[out]`.
            bias: `[out]`, any floating type.
        """


class Experts(Protocol):
    def __call__(
        self,
        hidden: Tensor,
        w13: Tensor,
        w2: Tensor,
        w13_scale: Tensor,
        w2_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
    ) -> Tensor:
        """Σ over a token's experts of weight · w2(silu(gate) ⊙ up), `[tokens, hidden]` in hidden's type.

        Args:
            hidden: `[tokens, hidden]`.
            w13, w2: from `pack_experts`, of int8 `[experts, 2 · intermediate, hidden]` (gate's rows, then up's) and
                `[experts, hidden, intermediate]`.
            w13_scale, w2_scale: float32 `[experts, 2 · intermediate]` and `[experts, hidden]`.
            topk_weights, topk_ids: float32 and int32 `[tokens, k]`.
        """


def define_linear(scheme: str, compute: Linear) -> Linear:
    """The operator `hunyuan_vllm::{scheme}_linear`."""
    schema = "(Tensor x, Tensor packed, Tensor scale, Tensor? bias=None) -> Tensor"
    return cast(Linear, _define(f"{scheme}_linear", schema, compute, _fake_linear))


def define_experts(scheme: str, compute: Experts) -> Experts:
    """The operator `hunyuan_vllm::{scheme}_experts`."""
    weights = "Tensor w13, Tensor w2, Tensor w13_scale, Tensor w2_scale"
    schema = f"(Tensor hidden, {weights}, Tensor topk_weights, Tensor topk_ids) -> Tensor"
    return cast(Experts, _define(f"{scheme}_experts", schema, compute, _fake_experts))


def _define(name: str, schema: str, compute: Callable, fake: Callable) -> Callable:
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, compute, "CPU")
    torch.library.register_fake(f"hunyuan_vllm::{name}", fake, lib=_LIBRARY)  # shapes, for tensors without data
    return getattr(torch.ops.hunyuan_vllm, name).default


def _fake_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0])


def _fake_experts(hidden: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(hidden)
