"""The arithmetic of the KV cache: what a token costs on a rank, and how many blocks and tokens fit into a memory.

Needs neither torch nor vLLM. `tests/test_cla_cache.py` holds it against the blocks that engines allocate.
"""

from __future__ import annotations

from dataclasses import dataclass

from hunyuan_vllm.config import HunYuanConfig

__all__ = ["CacheShape"]


@dataclass(frozen=True)
class CacheShape:
    """What one token costs in the KV cache of one rank.

    Attributes:
        layers: attention layers on the rank (its pipeline stage).
        owners: those that keep K and V.
        kv_heads: KV heads on the rank; `max(1, total / tensor_parallel)`.
        head_dim: elements of K, and of V, a head.
        itemsize: bytes an element (2 for bfloat16, 1 for FP8).
        dcp: decode-context-parallel ranks among which a sequence's tokens are spread.
    """

    layers: int
    owners: int
    kv_heads: int
    head_dim: int
    itemsize: int
    dcp: int = 1

    @classmethod
    def of(
        cls,
        config: HunYuanConfig,
        *,
        tensor_parallel: int = 1,
        stage: range | None = None,
        itemsize: int = 2,
        sharing: bool = True,
        dcp: int = 1,
    ) -> CacheShape:
        """The shape for a config; `stage` is the rank's pipeline stage (default: all layers)."""
        layers = stage if stage is not None else range(config.num_hidden_layers)
        owners = sum(not (sharing and config.is_cross(layer)) for layer in layers)
        kv_heads = max(1, config.num_key_value_heads // tensor_parallel)
        return cls(len(layers), owners, kv_heads, config.head_dim, itemsize, dcp)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V that one token takes on this rank (where it is held, with dcp > 1)."""
        return 2 * self.owners * self.kv_heads * self.head_dim * self.itemsize

    def blocks(self, memory: int, block_size: int) -> int:
        """KV blocks of `block_size` tokens that fit into `memory` bytes on this rank."""
        return memory // (self.bytes_per_token * block_size)

    def tokens(self, memory: int, block_size: int) -> int:
        """Tokens of context that `memory` bytes a rank can hold."""
        return self.blocks(memory, block_size) * block_size * self.dcp
