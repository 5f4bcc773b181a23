"""Loading a checkpoint under ZeRO-3: one tensor is whole at a time, read by one process and sent to the others."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig

from hunyuan_vllm.checkpoint import shard_files
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import Layout
from hunyuan_vllm.reference import HunYuanForCausalLM

__all__ = ["load_partitioned"]


def load_partitioned(folder: Path, dtype: torch.dtype) -> HunYuanForCausalLM:
    """The checkpoint in `folder`, of which each process keeps its part. Every process must call this.

    transformers' own loader reads the whole checkpoint in every process: 780 GB, eight times a node, for 389B.
    """
    config = HunYuanConfig.from_pretrained(folder)
    model = HunYuanForCausalLM._from_config(config, dtype=dtype)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layout = Layout(config)
    first = torch.distributed.get_rank() == 0
    for shard in shard_files(folder):
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():
                _load(parameters, layout, name, tensors, first)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = model.config.name_or_path = str(folder)
    return model


def _load(parameters: dict[str, nn.Parameter], layout: Layout, name: str, tensors: safe_open, first: bool) -> None:
    """Give `name`'s values to the parameters that hold them."""
    from deepspeed.runtime.zero import GatheredParameters

    names = layout.names(name, tensors.get_slice(name).get_shape())
    parts = dict(layout.split(name, tensors.get_tensor(name))) if first and names else {}
    wanted = [parameters[one] for one in names]
    with GatheredParameters(wanted, modifier_rank=0):
        for one, parameter in zip(names, wanted, strict=True):
            if first:
                parameter.data.copy_(parts[one])
