"""The model as it is trained"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig

from hunyuan_vllm.checkpoint import check_headers, missing_config, missing_weights, shard_files
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError, Layout
from hunyuan_vllm.reference import HunYuanForCausalLM, MoE
from hunyuan_vllm.util.errors import UserError


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


ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
"""What LoRA is put on unless told otherwise; cross layers have no k_proj and v_proj."""


def check_base(folder: Path) -> HunYuanConfig:
    """The config of a checkpoint that can be trained, seen from its files' headers.

    Raises:
        UserError: it is not there, not of this architecture, incomplete, or quantised.
    """
    file = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"--model_name_or_path {folder} is no folder: name the folder of a checkpoint")
    if not file.is_file():
        raise UserError(f"--model_name_or_path {folder} {': '.join(missing_config(folder))}")
    try:
        fields = json.loads(file.read_text())
        if scheme := fields.get("quantization_config"):
            method = scheme.get("quant_method", "unknown")
            raise UserError(f"{folder} is quantised ({method}): train the BF16 checkpoint it was made from")
        config = HunYuanConfig.from_pretrained(folder)
        if not check_headers(folder, Layout(config)):
            raise CheckpointError(f"it {': '.join(missing_weights(folder))}")
    except (CheckpointError, OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be trained: {str(error).splitlines()[0]}") from None
    return config


def load_model(folder: Path, dtype: torch.dtype) -> HunYuanForCausalLM:
    """The checkpoint in `folder`, in `dtype`; under ZeRO-3 each process holds only its part.

    Raises:
        UserError: it cannot be read.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    try:
        if is_deepspeed_zero3_enabled():
            return load_partitioned(folder, dtype)
        return HunYuanForCausalLM.from_pretrained(folder, dtype=dtype)
    except (CheckpointError, OSError) as error:
        raise UserError(f"{folder} cannot be read: {str(error).splitlines()[0]}") from None


def new_model(config: HunYuanConfig, dtype: torch.dtype) -> HunYuanForCausalLM:
    """A network with random weights, drawn as `initializer_range` says; under ZeRO-3 in parts."""
    return HunYuanForCausalLM._from_config(config, dtype=dtype)


def train_attention_only(model: nn.Module) -> None:
    """Freeze all but attention: its four projections and the query and key norms."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".self_attn." in name)


def add_lora(
    model: HunYuanForCausalLM, *, rank: int, alpha: float, dropout: float, targets: Sequence[str], base: Path | None
) -> Any:
    """`model` as a PeftModel: its weights frozen, adapters on every module whose name ends with one of `targets`.

    Raises:
        UserError: the network has no such module, or one that takes no adapter.
    """
    from peft import LoraConfig, get_peft_model

    linears = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linears -= {"wg", "lm_head"}
    for target in targets:
        if target not in linears:
            raise UserError(f"--lora_target_modules {target}: this network has {', '.join(sorted(linears))}")
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none",
        task_type="CAUSAL_LM", base_model_name_or_path=str(base) if base else None,
    )  # fmt: skip
    if base is not None:
        model.name_or_path = str(base)
    return get_peft_model(model, settings)


def make_moe_leaves(model: nn.Module) -> int:
    """Have ZeRO-3 gather each layer's experts as one, before the layer runs; the number of such layers.

    Without it each expert is gathered when its turn comes, which takes less memory and more, smaller messages.
    """
    from deepspeed.utils import set_z3_leaf_modules

    if not any(isinstance(module, MoE) for module in model.modules()):
        return 0
    return len(set_z3_leaf_modules(model, [MoE]))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters that are trained, and all, whole ones where ZeRO-3 holds parts."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
