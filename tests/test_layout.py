"""Names and shapes of a checkpoint: what is accepted, what is skipped, and how a misfit is named."""

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import VARIANTS, rewrite, stack_experts, tiny_config, write_checkpoint
from golden_data import GOLDEN, GOLDEN_NAMES
from safetensors.torch import save_file

from hunyuan_vllm.checkpoint import INDEX_FILE, check_headers
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError, Layout, expected_tensors
from hunyuan_vllm.reference import HunYuanForCausalLM

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A sound checkpoint in several shards."""
    return write_checkpoint(tmp_path / "model", tiny_config(), shard_bytes=500_000)


def replace(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    tensors.clear()
    tensors.update(others)


def refused(directory: Path) -> str:
    config = HunYuanConfig.from_pretrained(directory)
    with pytest.raises(CheckpointError) as raised:
        check_headers(directory, Layout(config))
    return str(raised.value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_expected_tensors_are_the_reference_models(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    with torch.device("meta"):
        state = {name: tuple(tensor.shape) for name, tensor in HunYuanForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert expected_tensors(config) == state


def test_the_published_model_has_388_7_billion_parameters() -> None:
    """The arithmetic of two independent sources: 388.7B in all, 51.3B of them active a token with one expert."""
    config = HunYuanConfig(
        use_cla=True, cla_share_factor=2, use_qk_norm=True, num_experts=16, use_mixed_mlp_moe=True,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    sizes = {name: torch.Size(shape).numel() for name, shape in expected_tensors(config).items()}
    assert round(sum(sizes.values()) / 1e9, 1) == 388.7
    active = sum(size for name, size in sizes.items() if ".experts." not in name or ".experts.0." in name)
    assert round(active / 1e9, 1) == 51.3


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_checkpoints_pass(name: str) -> None:
    config = HunYuanConfig.from_pretrained(GOLDEN / name)
    assert check_headers(GOLDEN / name, Layout(config)) == len(expected_tensors(config))


def test_shards_pass(directory: Path) -> None:
    config = HunYuanConfig.from_pretrained(directory)
    assert len(list(directory.glob("*.safetensors"))) > 2
    assert check_headers(directory, Layout(config)) == len(expected_tensors(config))


def test_missing_tensor(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.pop(EXPERT))
    assert f"lacks checkpoint tensor {EXPERT!r}" in refused(directory)


def test_unknown_tensor(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.update({"model.layers.1.self_attn.k_proj.weight": torch.ones(64, 128)}))
    assert "'model.layers.1.self_attn.k_proj.weight' is not part of this network" in refused(directory)


@pytest.mark.parametrize(
    "tensor", [torch.ones(95, 128), torch.ones(0), torch.ones(128, 96)], ids=["short", "empty", "T"]
)
def test_misshapen_tensor(tensor: torch.Tensor, directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.update({EXPERT: tensor}))
    assert f"{EXPERT!r} has shape {list(tensor.shape)}; this config needs [96, 128]" in refused(directory)


def test_tensor_in_two_files(directory: Path) -> None:
    rewrite(directory, lambda tensors: None)
    save_file({EXPERT: torch.ones(96, 128)}, directory / "more.safetensors")
    message = refused(directory)
    assert EXPERT in message and "model.safetensors" in message and "more.safetensors" in message


def test_both_fused_and_separate(directory: Path) -> None:
    name = "model.layers.0.self_attn.qkv_proj.weight"
    rewrite(directory, lambda tensors: tensors.update({name: torch.ones(256, 128)}))
    assert re.search(r"self_attn\.[qkv]_proj\.weight' is in .* and also in", refused(directory))


def test_truncated_shard(directory: Path) -> None:
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert f"{shard} is truncated" in refused(directory)


@pytest.mark.parametrize("content", [b"", b"\x10", b"not a safetensors file at all, but long enough to look like one"])
def test_not_a_shard(content: bytes, directory: Path) -> None:
    shard = sorted(directory.glob("*.safetensors"))[0]
    shard.write_bytes(content)
    assert str(shard) in refused(directory)


def test_index_names_a_missing_file(directory: Path) -> None:
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    message = refused(directory)
    assert shard.name in message and INDEX_FILE in message and "download" in message


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": 3}', json.dumps({"metadata": {}})])
def test_broken_index(content: str, directory: Path) -> None:
    (directory / INDEX_FILE).write_text(content)
    assert INDEX_FILE in refused(directory)


def test_stacked_experts(directory: Path) -> None:
    config = HunYuanConfig.from_pretrained(directory)
    expected = expected_tensors(config)
    plain: dict[str, torch.Tensor] = {}
    rewrite(directory, lambda tensors: plain.update(tensors) or replace(tensors, stack_experts(tensors)))
    assert check_headers(directory, Layout(config)) == len(expected)
    layout = Layout(config)
    found = {
        part: tensor for name, stored in stack_experts(plain).items() for part, tensor in layout.split(name, stored)
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], plain[name]) for name in expected)


def test_stacked_experts_of_another_number_or_of_a_dense_layer_are_named(directory: Path) -> None:
    layout = Layout(HunYuanConfig.from_pretrained(directory))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(CheckpointError, match=r"shape \[3, 192, 128\]; this config needs \[4, 192, 128\]"):
        layout.names(name, (3, 192, 128))
    with pytest.raises(CheckpointError, match="not part of this network"):
        Layout(tiny_config(num_experts=1)).names(name, (4, 192, 128))
