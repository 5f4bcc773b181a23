"""What the KV cache costs on a rank, and where a pipeline may be cut: a stage starts on an owner layer"""

import os
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

from hunyuan_vllm.network import Network


@dataclass(frozen=True)
class CacheShape:
    """The KV cache of one rank.

    Attributes:
        layers: attention layers on the rank (its pipeline stage).
        owners: those that keep K and V.
        bytes_per_token: of K and V that one token takes on this rank (where it is held, with context parallelism).
    """

    layers: int
    owners: int
    bytes_per_token: int

    @classmethod
    def of(
        cls,
        config: Network,
        *,
        tensor_parallel: int = 1,
        stage: range | None = None,
        itemsize: int = 2,
        sharing: bool = True,
    ) -> Self:
        """The shape for a config, `itemsize` bytes an element; `stage` is the rank's (default: all layers)."""
        layers = stage if stage is not None else range(config.num_hidden_layers)
        owners = sum(not (sharing and config.is_cross(layer)) for layer in layers)
        kv_heads = max(1, config.num_key_value_heads // tensor_parallel)
        return cls(len(layers), owners, 2 * owners * kv_heads * config.head_dim * itemsize)

    def blocks(self, memory: int, block_size: int) -> int:
        """KV blocks of `block_size` tokens that fit into `memory` bytes on this rank."""
        return memory // (self.bytes_per_token * block_size)


def even_partition(layers: int, stages: int) -> list[int]:
    """Layers a stage as vLLM cuts by itself (`vllm.distributed.utils.get_pp_indices`)."""
    partition = [layers // stages] * stages
    for stage in range(2, layers % stages + 2):
        partition[-stage] += 1
    return partition


def legal_partition(config: Network, stages: int) -> list[int] | None:
    """The most even partition whose stages all start on an owner layer; None if there are fewer groups than stages.

    A last, incomplete group stays whole, in the last stage.
    """
    factor = config.cla_share_factor if config.use_cla else 1
    groups = -(-config.num_hidden_layers // factor)
    if groups < stages:
        return None
    partition = [count * factor for count in even_partition(groups, stages)]
    partition[-1] -= groups * factor - config.num_hidden_layers
    return partition


def check_pipeline(config: Network, stages: int) -> None:
    """Check the cut that vLLM will make (VLLM_PP_LAYER_PARTITION, or even).

    Raises:
        ValueError: a stage would start inside a CLA group; names the layer and a partition that works.
    """
    if stages == 1:
        return
    given = os.environ.get("VLLM_PP_LAYER_PARTITION")
    try:
        partition = [int(part) for part in given.split(",")] if given else []
    except ValueError:
        return  # vLLM says so itself
    partition = partition or even_partition(config.num_hidden_layers, stages)
    legal = legal_partition(config, stages)
    for start in accumulate(partition[:-1]):
        if not config.is_cross(start):
            continue
        remedy = (
            f"set VLLM_PP_LAYER_PARTITION={','.join(map(str, legal))}"
            if legal
            else f"use at most {-(-config.num_hidden_layers // config.cla_share_factor)} stages"
        )
        raise ValueError(
            f"pipeline_parallel_size={stages} would start a stage at layer {start}, a cross layer that reads the KV "
            f"cache of layer {config.kv_owner(start)} on another stage: {remedy}"
        )
