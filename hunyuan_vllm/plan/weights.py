"""Bytes of weights on one rank, exact: what vLLM's layers allocate, by what they are for.

`tests/plan/` holds it against the real model class (test_plan_weights.py) and against engines (test_plan_engine.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.plan.hardware import Gpu
from hunyuan_vllm.plan.model import Network, layer_matrices, padded_vocabulary, vectors
from hunyuan_vllm.plan.schemes import BF16, FLOAT32, Scheme

__all__ = ["Stage", "Weights", "rank_weights", "stages"]

CACHE_SCALES = 4  # float32 scalars that vLLM's Attention keeps: of q, k, v and the probabilities


@dataclass(frozen=True)
class Stage:
    """The layers of a pipeline stage.

    Attributes:
        first, last: it has the embedding; it has the final norm and the head.
    """

    layers: range
    first: bool = True
    last: bool = True


@dataclass(frozen=True)
class Weights:
    """Bytes on one rank.

    Attributes:
        parts: parameters by what they are for; their sum is `parameters`.
        buffers: tensors that are no parameters: the rotary table, folded norms, cache scales.
        padding: what CUDA kernels add while they pack weights.
    """

    parts: dict[str, int]
    buffers: int
    padding: int

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        return self.parameters + self.buffers + self.padding


def stages(config: HunYuanConfig, partition: list[int]) -> list[Stage]:
    """Pipeline stages of so many layers each."""
    starts = [sum(partition[:stage]) for stage in range(len(partition))]
    return [
        Stage(range(start, start + count), start == 0, start + count == config.num_hidden_layers)
        for start, count in zip(starts, partition, strict=True)
    ]


def rank_weights(
    network: Network, scheme: Scheme, ranks: int, stage: Stage | None = None, gpu: Gpu | None = None
) -> Weights:
    """Bytes on each of `ranks` tensor-parallel ranks of a stage (default: the whole network), on CPUs if no GPU is
    given."""
    config = network.config
    stage = stage or Stage(range(config.num_hidden_layers))
    parts: Counter[str] = Counter()
    padding = 0
    for layer, count in network.kinds(stage.layers):
        for matrix in layer_matrices(config, layer, ranks):
            parts[matrix.part] += count * scheme.parameter_bytes(matrix, on_cpu=gpu is None)
            padding += count * scheme.padding(matrix, gpu) if gpu else 0
    parts["norms"] = BF16 * vectors(config) * len(stage.layers)
    table = BF16 * padded_vocabulary(config) // ranks * config.hidden_size
    if stage.first or (config.tie_word_embeddings and stage.last):
        parts["embedding"] = table
    if stage.last:
        parts["norms"] += BF16 * config.hidden_size
        if not config.tie_word_embeddings:
            parts["head"] = table
    return Weights(dict(parts), _buffers(config, len(stage.layers)), padding)


def _buffers(config: HunYuanConfig, layers: int) -> int:
    folded = BF16 * config.head_dim if config.use_qk_norm else 0
    rope = config.rope_parameters
    positions = config.max_position_embeddings
    if rope["rope_type"] == "linear" or (rope["rope_type"] == "dynamic" and "alpha" not in rope):
        positions = int(positions * rope["factor"])
    return BF16 * positions * config.head_dim + layers * (folded + FLOAT32 * CACHE_SCALES)
