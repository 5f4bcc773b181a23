"""The query/key norms with the key's weight folded into the query's, and the rotary embedding"""

import math

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.cpu import has_native_kernels


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
        self.is_native = has_native_kernels()

    @torch.no_grad()
    def fold(self) -> None:
        """Recompute `weight` in place, so that captured graphs keep seeing it."""
        self.weight.copy_(self.query_weight.float() * self.key_weight.float())

    def bound(self) -> float:
        """The maximum of |q| after this norm: every element of q / rms(q) is within ± sqrt(head_dim)."""
        return math.sqrt(self.hidden_size) * self.weight.abs().max().item()


class RoundedRotaryEmbedding(RotaryEmbedding):
    """Unscaled RoPE with inverse frequencies rounded to bfloat16, as Hunyuan-Large was trained.

    Without the rounding float32 log-probabilities move by whole units; in bfloat16 the mistake hides.
    """

    def _compute_inv_freq(self, base: float) -> torch.Tensor:
        return super()._compute_inv_freq(base).to(torch.bfloat16).to(torch.float32)


def make_rotary(config: HunYuanConfig, served_length: int) -> RotaryEmbedding:
    """Build the rotary embedding for a whole head, rotate-half style, shared by all layers.

    `rope_type` "dynamic" with `alpha` is NTK-alpha (base·alpha^(d/(d-2)), whatever the length); its table, as that of
    plain RoPE, has `served_length` positions where that is more than the config's. "linear" and "dynamic" with `factor`
    alone are vLLM's.
    """
    rope, length = config.rope_parameters, config.max_position_embeddings
    if rope["rope_type"] == "default" and not config.is_v1:
        return RoundedRotaryEmbedding(
            head_size=config.head_dim,
            rotary_dim=config.head_dim,
            max_position_embeddings=max(length, served_length),
            base=rope["rope_theta"],
            is_neox_style=True,
            dtype=torch.get_default_dtype(),
        )
    if rope["rope_type"] == "dynamic" and "alpha" not in rope:  # vLLM wants the extended length beside the trained one
        rope = rope | {"max_trained_positions": length}
        length = int(length * rope["factor"])
    elif rope["rope_type"] != "linear":  # whose table vLLM makes `factor` times as long
        length = max(length, served_length)
    return get_rope(
        head_size=config.head_dim,
        max_position=length,
        is_neox_style=True,
        rope_parameters=rope,
    )


def rotate_and_normalize(
    qk: Tensor,
    positions: Tensor,
    rotary: RotaryEmbedding,
    q_norm: FoldedQueryNorm | None,
    k_norm: RMSNorm | None,
    heads: int,
    key_heads: int,
) -> tuple[Tensor, Tensor | None]:
    """The rotary embedding of queries and keys and then, where there are norms, the norm of each head.

    `qk` is `[tokens, (heads + key_heads) · size]`, queries first; with no `key_heads` there are no keys.
    """
    size = rotary.head_size
    if q_norm is not None and q_norm.is_native:
        table, eps = rotary.cos_sin_cache.to(torch.bfloat16), q_norm.variance_epsilon
        run = torch.ops.hunyuan_vllm.rotate_and_normalize
        return run(qk, positions, table, q_norm.weight, heads, key_heads, eps)
    q, k = qk.split([heads * size, key_heads * size], dim=-1) if key_heads else (qk, None)
    q, k = rotary(positions, q, k)

    def per_head(norm: RMSNorm | None, x: Tensor) -> Tensor:
        return x if norm is None else norm(x.view(*x.shape[:-1], -1, size)).view(x.shape)

    return per_head(q_norm, q), None if k is None else per_head(k_norm, k)
