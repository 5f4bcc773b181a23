"""One scheme's int8 products, for a CPU: packed for the C++ kernels where they are, in plain torch elsewhere.

A weight is packed once and is then opaque: only the products that packed it can read it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hunyuan_vllm.native import operators
from hunyuan_vllm.quant.cpu import portable

__all__ = ["Products", "SharedExpert"]

SharedExpert = tuple[Tensor, Tensor, Tensor, Tensor]
"""From `pack_linear`: w13, of int8 `[2 · intermediate, hidden]`, w2, of `[hidden, intermediate]`; and their scales."""

_LIBRARY = torch.library.Library("hunyuan_vllm", "FRAGMENT")


class Products:
    """Linears and SiLU-gated experts of the scheme "w8a16" or "w8a8".

    Args:
        scheme: as the operators are called.
        product: what is computed, in plain torch.
    """

    def __init__(self, scheme: str, product: portable.Product) -> None:
        self.scheme = scheme
        self._portable_linear = _define(
            f"{scheme}_portable_linear",
            "(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
            lambda *tensors: portable.linear(product, *tensors),
            lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
        )
        self._portable_experts = _define(
            f"{scheme}_portable_experts",
            "(Tensor hidden, Tensor w13, Tensor w2, Tensor w13_scale, Tensor w2_scale, Tensor topk_weights, "
            "Tensor topk_ids) -> Tensor",
            lambda *tensors: portable.experts(product, *tensors),
            lambda hidden, *_: hidden.new_empty(hidden.shape),
        )

    def pack_linear(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """int8 `[out, in]` → what `linear` takes for rows of type `dtype`."""
        return self.pack_experts(weight.unsqueeze(0), dtype).squeeze(0)

    def pack_experts(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """int8 `[experts, out, in]` → what `experts` takes for rows of type `dtype`: uint8, or the weight as it is."""
        if dtype != torch.bfloat16 or not operators.available():
            return weight.contiguous()
        return getattr(torch.ops.hunyuan_vllm, f"{self.scheme}_pack_experts")(weight)

    def linear(self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        """x · (scale ⊙ weight)ᵀ + bias, `[tokens, out]` in x's type.

        Args:
            x: `[tokens, in]`.
            packed: from `pack_linear`, of int8 `[out, in]`.
            scale: float32 `[out]`.
            bias: `[out]`, any floating type.
        """
        bias = None if bias is None else bias.float()
        if packed.dtype != torch.uint8:
            return self._portable_linear(x, packed, scale, bias)
        return getattr(torch.ops.hunyuan_vllm, f"{self.scheme}_linear")(x, packed, scale, bias)

    def experts(
        self,
        hidden: Tensor,
        w13: Tensor,
        w2: Tensor,
        w13_scale: Tensor,
        w2_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared: SharedExpert | None = None,
    ) -> Tensor:
        """Σ over a token's experts of weight · w2(silu(gate) ⊙ up), `[tokens, hidden]` in hidden's type.

        Args:
            hidden: `[tokens, hidden]`.
            w13, w2: from `pack_experts`, of int8 `[experts, 2 · intermediate, hidden]` (gate's rows, then up's) and
                `[experts, hidden, intermediate]`.
            w13_scale, w2_scale: float32 `[experts, 2 · intermediate]` and `[experts, hidden]`.
            topk_weights, topk_ids: float32 and int32 `[tokens, k]`.
            shared: added with weight 1; for packed weights only.
        """
        tensors = (w13, w2, w13_scale, w2_scale, topk_weights.float().contiguous(), topk_ids.int().contiguous())
        if w13.dtype != torch.uint8:
            assert shared is None
            return self._portable_experts(hidden, *tensors)
        return getattr(torch.ops.hunyuan_vllm, f"{self.scheme}_experts")(hidden, *tensors, *(shared or (None,) * 4))


def _define(name: str, schema: str, compute: Callable, fake: Callable) -> Callable[..., Tensor]:
    """An operator for CPU tensors, which torch.compile does not look into; `fake` is for tensors without data."""
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, compute, "CPU")
    torch.library.register_fake(f"hunyuan_vllm::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.hunyuan_vllm, name).default
