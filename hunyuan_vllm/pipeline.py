"""Pipeline cuts: a stage must start on an owner layer, because its cross layers read a cache on the same rank."""

from __future__ import annotations

import os
from itertools import accumulate

from hunyuan_vllm.config import HunYuanConfig

__all__ = ["check_pipeline", "even_partition", "legal_partition"]


def even_partition(layers: int, stages: int) -> list[int]:
    """Layers a stage as vLLM cuts by itself (`vllm.distributed.utils.get_pp_indices`)."""
    partition = [layers // stages] * stages
    for stage in range(2, layers % stages + 2):
        partition[-stage] += 1
    return partition


def legal_partition(config: HunYuanConfig, stages: int) -> list[int] | None:
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


def check_pipeline(config: HunYuanConfig, stages: int) -> None:
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
