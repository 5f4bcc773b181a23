"""The rotary embedding a Hunyuan config asks for, from vLLM's own classes.

Only the plain variant is ours: the published code rounds its inverse frequencies to bfloat16, which vLLM does not.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope

from hunyuan_vllm.config import HunYuanConfig

__all__ = ["PlainRotaryEmbedding", "make_rotary"]


class PlainRotaryEmbedding(RotaryEmbedding):
    """Unscaled RoPE with inverse frequencies rounded to bfloat16, as the published network was trained.

    Without the rounding float32 log-probabilities move by whole units; in bfloat16 the mistake hides.
    """

    def _compute_inv_freq(self, base: float) -> torch.Tensor:
        return super()._compute_inv_freq(base).to(torch.bfloat16).to(torch.float32)


def make_rotary(config: HunYuanConfig) -> RotaryEmbedding:
    """Build the rotary embedding for a whole head, rotate-half style, shared by all layers.

    `rope_type` "dynamic" with `alpha` is NTK-alpha (base·alpha^(d/(d-2)), independent of the length); "linear" and
    "dynamic" with `factor` alone are vLLM's.
    """
    rope = config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        return PlainRotaryEmbedding(
            head_size=config.head_dim,
            rotary_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            base=rope["rope_theta"],
            is_neox_style=True,
            dtype=torch.get_default_dtype(),
        )
    length = config.max_position_embeddings
    if rope["rope_type"] == "dynamic" and "alpha" not in rope:  # vLLM wants the extended length beside the trained one
        rope = rope | {"max_trained_positions": length}
        length = int(length * rope["factor"])
    return get_rope(
        head_size=config.head_dim,
        max_position=length,
        is_neox_style=True,
        rope_parameters=rope,
    )
