"""Bytes a token that the forward pass keeps for the backward pass, in bfloat16, as `reference.py` computes.

Held against what autograd really keeps (tests/plan/test_training_plan.py).
"""

from __future__ import annotations

from hunyuan_vllm.config import HunYuanConfig

__all__ = ["checkpoint_bytes", "head_bytes", "input_bytes", "layer_bytes", "widest_bytes"]

BF16, F32, INT64 = 2, 4, 8


def input_bytes(config: HunYuanConfig) -> int:
    """Ids, and the cosines and sines of their positions."""
    return INT64 + 2 * BF16 * config.head_dim


def layer_bytes(config: HunYuanConfig, layer: int) -> int:
    """Of one layer, all its intermediate tensors."""
    return _attention(config, layer) + _feed_forward(config, layer) + 2 * _norm(config.hidden_size)


def checkpoint_bytes(config: HunYuanConfig, layer: int) -> int:
    """Of one layer that is computed again: its input, and its own K and V, which it hands to the next one."""
    hands_on = not config.is_cross(layer) and layer + 1 < config.num_hidden_layers
    return BF16 * (config.hidden_size + (2 * config.num_key_value_heads * config.head_dim if hands_on else 0))


def head_bytes(config: HunYuanConfig, logit_bytes: float) -> float:
    """Of the final norm, the logits (so many bytes each) and the loss."""
    return _norm(config.hidden_size) + BF16 * config.hidden_size + logit_bytes * config.vocab_size


def widest_bytes(config: HunYuanConfig, layer: int) -> int:
    """Of the widest tensor in a layer: what a gradient in flight takes."""
    queries = config.num_attention_heads * config.head_dim
    width = config.intermediate_at(layer)
    shared = width * config.shared_experts_at(layer)
    return max(F32 * config.hidden_size, BF16 * queries, BF16 * (width * config.topk_at(layer) + shared))


def _norm(size: int) -> int:
    """The float32 copy, its reciprocal root (4 bytes in all), and the normed value before the weight."""
    return F32 * size + F32 + BF16 * size


def _heads_norm(heads: int, head_dim: int) -> int:
    return heads * _norm(head_dim)


def _attention(config: HunYuanConfig, layer: int) -> int:
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    queries, kv = heads * head_dim, kv_heads * head_dim
    kept = BF16 * hidden  # the projections' input
    if config.use_qk_norm:
        kept += _heads_norm(heads, head_dim) + _heads_norm(kv_heads, head_dim)
    # Normed q and k, as attention reads them. Without norms a cross layer reads its owner's k, which is kept already.
    kept += BF16 * (queries + (kv if config.use_qk_norm or not config.is_cross(layer) else 0))
    kept += 0 if config.is_cross(layer) else BF16 * kv  # v, which cross layers read again
    return kept + BF16 * queries + F32 * heads  # attention's output and its log-sum-exp


def _feed_forward(config: HunYuanConfig, layer: int) -> int:
    hidden, width = config.hidden_size, config.intermediate_at(layer)
    experts, topk, shared = config.experts_at(layer), config.topk_at(layer), config.shared_experts_at(layer)
    if experts == 1:
        return BF16 * hidden + _mlp(width)
    kept = F32 * (hidden + experts)  # the router's input and its probabilities
    if topk > 1:
        kept += F32 * (topk + 1)  # before they are divided by their sum, and the sum
    # Of each choice: the token, its way through the expert, the output in order; three indices and the weight.
    kept += topk * (2 * BF16 * hidden + _mlp(width) + 3 * INT64 + BF16)
    return kept + (BF16 * hidden + _mlp(width * shared) if shared else 0)


def _mlp(width: int) -> int:
    """gate's and up's outputs, silu of the first, and their product."""
    return 4 * BF16 * width
