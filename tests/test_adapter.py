"""Adapters that cannot be served as they were trained: refused by name, from their files' headers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import adapter_pairs, rename_modules, write_adapter
from checkpoints import tiny_config
from safetensors.torch import load_file, save_file

from hunyuan_vllm.adapter import ADAPTER_CONFIG, ADAPTER_FILE, check_adapter, check_modules
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.util.errors import UserError

ATTENTION = "model.layers.0.self_attn.q_proj"
MLP = "model.layers.0.mlp.shared_mlp.up_proj"


@pytest.fixture
def config() -> HunYuanConfig:
    return tiny_config()


@pytest.fixture
def directory(tmp_path: Path, config: HunYuanConfig) -> Path:
    return write_adapter(tmp_path / "adapter", adapter_pairs(config))


def test_accepted(directory: Path, config: HunYuanConfig) -> None:
    for cpu in (True, False):
        check_adapter(directory, config, cpu, max_rank=16)
    check_modules("x", [ATTENTION, MLP, "model.layers.0.mlp.gate"], config, cpu=False)
    check_modules("x", [ATTENTION, MLP], config, cpu=False, targets=["up_proj"])


def test_pickled_weights_are_left_to_vllm(directory: Path, config: HunYuanConfig) -> None:
    (directory / ADAPTER_FILE).rename(directory / "adapter_model.bin")
    check_adapter(directory, config, cpu=True)


@pytest.mark.parametrize(
    ("rename", "reason"),
    [
        (lambda name: name.replace("model.layers", "transformer.layers"),
         r"none of its \d+ modules \(transformer.layers.0.self_attn.\w+, …\) is one of this network's"),
        (lambda name: f"model.{name}", "saved with another prefix than in base_model.model.model.layers.0."),
        (lambda name: name.replace("layers.0.", "layers.99."), "layers.99.self_attn.*: this network has 4 layers"),
        (lambda name: name.replace("layers.0.self_attn.k_proj", "layers.1.self_attn.k_proj"),
         "layer 1 shares the K and V of layer 0, and has no k_proj"),
        (lambda name: name.replace("layers.0.self_attn.q_proj", "embed_tokens"),
         "adapters of the embedding or the head are not served"),
        (lambda name: name.replace("layers.0.self_attn.q_proj", "layers.0.mlp.shared_mlp.up_proj"),
         f"acts on {MLP}, and on CPUs adapters act on attention only: merge it"),
    ],
)  # fmt: skip
def test_modules_that_would_be_passed_over(
    directory: Path, config: HunYuanConfig, rename: Callable[[str], str], reason: str
) -> None:
    rename_modules(directory, rename)
    with pytest.raises(UserError, match=reason) as error:
        check_adapter(directory, config, cpu=True)
    assert str(error.value).startswith(str(directory / ADAPTER_FILE))


def test_targets_that_the_adapter_does_not_act_on(config: HunYuanConfig) -> None:
    with pytest.raises(UserError, match="adapter x: it acts on none of --lora-target-modules up_proj"):
        check_modules("adapter x", [ATTENTION], config, cpu=False, targets=["up_proj"])
    with pytest.raises(UserError, match="none of its 0 modules is one"):
        check_modules("adapter x", [], config, cpu=False)


def mlx(directory: Path, with_config: bool) -> None:
    tensors = load_file(directory / ADAPTER_FILE)
    (directory / ADAPTER_FILE).unlink()
    renamed = {name.removesuffix(".weight").replace("lora_A", "lora_a"): tensor for name, tensor in tensors.items()}
    save_file(renamed, directory / "adapters.safetensors")
    if with_config:
        settings = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 8, "scale": 20.0}}
        (directory / ADAPTER_CONFIG).write_text(json.dumps(settings))
    else:
        (directory / ADAPTER_CONFIG).unlink()


def rewrite_config(directory: Path, **fields: object) -> None:
    file = directory / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda directory: mlx(directory, True), "holds an adapter of MLX, not of PEFT: fuse it .* with mlx_lm.fuse"),
        (lambda directory: mlx(directory, False), "holds an adapter of MLX"),
        (lambda directory: (directory / ADAPTER_CONFIG).unlink(), f"has no {ADAPTER_CONFIG}: name the directory"),
        (lambda directory: (directory / ADAPTER_CONFIG).write_text("[]"), f"{ADAPTER_CONFIG} is not a JSON object"),
        (lambda directory: rewrite_config(directory, peft_type="IA3"), "peft_type is 'IA3', and only LORA"),
        (lambda directory: rewrite_config(directory, rank_pattern={"q_proj": 64}),
         "has rank 64, but the server allows 16: add --max-lora-rank 64"),
        (lambda directory: (directory / ADAPTER_FILE).unlink(), f"has no {ADAPTER_FILE}"),
        (lambda directory: (directory / ADAPTER_FILE).write_bytes(b"\x08"), "is truncated or not a safetensors file"),
        (lambda directory: save_file({"model.layers.0.weight": torch.zeros(1)}, directory / ADAPTER_FILE),
         "'model.layers.0.weight' is not A or B of a linear layer"),
    ],
)  # fmt: skip
def test_what_is_no_adapter(
    directory: Path, config: HunYuanConfig, damage: Callable[[Path], object], reason: str
) -> None:
    damage(directory)
    with pytest.raises(UserError, match=reason) as error:
        check_adapter(directory, config, cpu=False, max_rank=16)
    assert str(directory) in str(error.value)


def test_a_directory_that_is_not_there(tmp_path: Path, config: HunYuanConfig) -> None:
    with pytest.raises(UserError, match="nowhere is not a directory"):
        check_adapter(tmp_path / "nowhere", config, cpu=False)
