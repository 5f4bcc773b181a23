"""The matrices of a network as one rank holds them: what takes memory, what a step reads and what it multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import tensor_parallel_sizes

__all__ = ["Matrix", "Network", "Part", "layer_matrices", "padded_vocabulary", "vectors"]

Part = Literal["attention", "experts", "shared mlp", "dense mlp", "router"]
VOCABULARY_MULTIPLE = 64  # vLLM pads the vocabulary to it (`DEFAULT_VOCAB_PADDING_SIZE`)


@dataclass(frozen=True)
class Matrix:
    """A rank's shard of a weight, or of several that are fused into one: `[copies, outputs, inputs]`.

    Attributes:
        shards: checkpoint tensors fused along the outputs (q, k and v; gate and up).
        copies: experts; 1 for what is no expert.
        bias: outputs with a bias.
        cut: along which side tensor parallelism cuts it: a kernel may pad that side.
    """

    part: Part
    outputs: int
    inputs: int
    shards: int = 1
    copies: int = 1
    bias: int = 0
    cut: Literal["outputs", "inputs", "none"] = "outputs"

    @property
    def elements(self) -> int:
        return self.copies * self.outputs * self.inputs

    @property
    def quantised(self) -> bool:
        """Whether the int8 and FP8 schemes quantise it (`hunyuan_vllm.quant.scheme.is_quantised`)."""
        return self.part in ("attention", "experts", "shared mlp", "dense mlp")


class Network:
    """A config, and what is asked of it again and again, worked out once."""

    def __init__(self, config: HunYuanConfig) -> None:
        self.config = config
        self._kinds: dict[range, list[tuple[int, int]]] = {}

    @cached_property
    def tensor_sizes(self) -> list[int]:
        """Tensor-parallel sizes that it divides over."""
        return tensor_parallel_sizes(self.config)

    def kinds(self, layers: range) -> list[tuple[int, int]]:
        """(a layer, how many of `layers` are like it): there are few kinds, and a sum over layers needs one of each."""
        if layers not in self._kinds:
            config = self.config
            alike: dict[tuple[int | bool, ...], list[int]] = {}
            for layer in layers:
                mlp = config.experts_at(layer), config.topk_at(layer), config.intermediate_at(layer)
                alike.setdefault((config.is_cross(layer), *mlp, config.shared_experts_at(layer)), []).append(layer)
            self._kinds[layers] = [(same[0], len(same)) for same in alike.values()]
        return self._kinds[layers]


def layer_matrices(config: HunYuanConfig, layer: int, ranks: int) -> Iterator[Matrix]:
    """The matrices of a layer on one of `ranks` tensor-parallel ranks; KV heads fewer than ranks are replicated."""
    yield from _attention(config, layer, ranks)
    experts, width = config.experts_at(layer), config.intermediate_at(layer) // ranks
    if experts == 1:
        yield from _mlp(config, "dense mlp", width)
        return
    yield Matrix("router", experts, config.hidden_size, cut="none")
    if shared := config.shared_experts_at(layer):
        yield from _mlp(config, "shared mlp", width * shared)
    yield from _mlp(config, "experts", width, experts)


def _attention(config: HunYuanConfig, layer: int, ranks: int) -> Iterator[Matrix]:
    hidden, bias = config.hidden_size, config.attention_bias
    q_size = config.num_attention_heads // ranks * config.head_dim
    kv_size = max(1, config.num_key_value_heads // ranks) * config.head_dim
    fused = q_size if config.is_cross(layer) else q_size + 2 * kv_size
    yield Matrix("attention", fused, hidden, 1 if config.is_cross(layer) else 3, bias=fused * bias)
    yield Matrix("attention", hidden, q_size, bias=hidden * bias, cut="inputs")


def _mlp(config: HunYuanConfig, part: Part, width: int, copies: int = 1) -> Iterator[Matrix]:
    hidden, bias = config.hidden_size, config.mlp_bias
    yield Matrix(part, 2 * width, hidden, 2, copies, 2 * width * bias)
    yield Matrix(part, hidden, width, 1, copies, hidden * bias, "inputs")


def padded_vocabulary(config: HunYuanConfig) -> int:
    """Rows of the embedding and of the head as vLLM builds them."""
    return -(-config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def vectors(config: HunYuanConfig) -> int:
    """Elements of a layer's norm weights, which every rank holds whole."""
    return 2 * config.hidden_size + (2 * config.head_dim if config.use_qk_norm else 0)
