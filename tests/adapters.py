"""LoRA adapters on every attention projection of a network, in PEFT's layout."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoints import random_tensors
from safetensors.torch import load_file, save_file

from hunyuan_vllm.config import HunYuanConfig

RANK, ALPHA = 4, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def adapter_pairs(config: HunYuanConfig, seed: int = 3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight name → (A `[rank, in]`, B `[out, rank]`) for every attention projection the network has."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, tensor in random_tensors(config, seed=0):
        if name.endswith(".weight") and name.split(".")[-2] in TARGETS:
            a = torch.randn(RANK, tensor.shape[1], generator=generator) / tensor.shape[1] ** 0.5
            b = torch.randn(tensor.shape[0], RANK, generator=generator) / RANK**0.5
            pairs[name] = (a, b)
    return pairs


def write_adapter(directory: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    """PEFT's layout."""
    directory.mkdir()
    tensors = {}
    for name, (a, b) in pairs.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a, b
    save_file(tensors, directory / "adapter_model.safetensors")
    adapter = dict(peft_type="LORA", r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), bias="none")
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    return directory


def rename_modules(directory: Path, rename: Callable[[str], str]) -> Path:
    """Give each tensor the name that `rename` makes of it, without PEFT's own prefix."""
    file, prefix = directory / "adapter_model.safetensors", "base_model.model."
    tensors = load_file(file)
    save_file({prefix + rename(name.removeprefix(prefix)): tensor for name, tensor in tensors.items()}, file)
    return directory
