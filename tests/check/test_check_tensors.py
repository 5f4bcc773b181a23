"""Names, shapes, types and scales: everything that does not fit is listed, not only the first."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoints import fuse, rewrite, with_strays
from damage import (
    FP8,
    PACKED,
    PLAIN,
    change_tensors,
    check_directory,
    copy_demo,
    edit_json,
    findings,
    only_problem,
    quantise,
)
from safetensors import safe_open
from torch import Tensor

from hunyuan_vllm import demo
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.util.findings import Status

WEIGHT = "model.layers.1.mlp.experts.2.up_proj."


def test_everything_wrong_is_listed_at_once(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.2.self_attn.k_proj.weight"]
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(8, 8)  # a cross layer has none
        tensors["model.layers.3.mlp.gate.wg.weight"] = torch.zeros(5, 192)
        tensors["model.layers.4.mlp.shared_mlp.up_proj.weight"] = torch.zeros(128, 192, dtype=torch.int8)

    rewrite(copy_demo(tmp_path), change)
    report = check_directory(tmp_path)
    found = {problem.subject: problem.items for problem in findings(report)}
    assert found == {
        "missing": ("model.layers.2.self_attn.k_proj.weight", "model.norm.weight"),
        "unknown": ("model.layers.1.self_attn.k_proj.weight",),
        "shapes": ("model.layers.3.mlp.gate.wg.weight is [5, 192], not [4, 192]",),
        "types": ("model.layers.4.mlp.shared_mlp.up_proj.weight",),
    }


def test_published_oddities_are_no_problem(tmp_path: Path) -> None:
    copy_demo(tmp_path)
    config = HunYuanConfig.from_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update(with_strays(dict(tensors), config)))
    report = check_directory(tmp_path)
    assert report.sound and not findings(report, Status.WARNING)
    (unused,) = [finding for finding in findings(report, Status.OK) if finding.subject == "unused"]
    assert "1 that" not in unused.text

    def fused(tensors: dict[str, Tensor]) -> None:
        together = fuse(dict(tensors), config)
        tensors.clear()
        tensors.update(together)

    rewrite(copy_demo(tmp_path), fused)
    assert check_directory(tmp_path).sound


def test_a_tensor_stored_fused_and_apart(tmp_path: Path) -> None:
    copy_demo(tmp_path)
    stem = "model.layers.0.mlp.experts.0."

    def change(tensors: dict[str, Tensor]) -> None:
        both = [tensors[f"{stem}{part}_proj.weight"] for part in ("up", "gate")]
        tensors[f"{stem}gate_and_up_proj.weight"] = torch.cat(both)

    rewrite(tmp_path, change)
    problem = only_problem(tmp_path)
    assert problem.subject == "twice"
    assert len(problem.items) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 8),
        ("num_experts", 8),
        ("vocab_size", 4096),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("head_dim", 64),
    ],
)
def test_a_config_of_another_checkpoint_is_named_by_its_field(tmp_path: Path, field: str, value: int) -> None:
    copy_demo(tmp_path)
    true = json.loads((tmp_path / "config.json").read_text())[field]
    edit_json(tmp_path / "config.json", **{field: value})
    first, *others = findings(check_directory(tmp_path))
    assert f"{field} {true}, config.json says {value}" in first.text
    assert others and all(problem.remedy == first.remedy for problem in others)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (dict(num_key_value_heads=3), "num_key_value_heads is 3"),
        (dict(model_type="llama"), "has model_type 'llama'"),
        (dict(architectures=["LlamaForCausalLM"]), "architectures is"),
        (dict(eos_token_id=2048), "eos_token_id is 2048, and the vocabulary has 2,048"),
        (dict(rope_scaling={"type": "yarn"}), "rope_scaling type is 'yarn'"),
    ],
)
def test_a_wrong_config(tmp_path: Path, fields: dict, text: str) -> None:
    edit_json(copy_demo(tmp_path) / "config.json", **fields)
    assert any(text in problem.text for problem in findings(check_directory(tmp_path)))


def test_no_config_leaves_the_rest_checked(tmp_path: Path) -> None:
    (copy_demo(tmp_path) / "config.json").unlink()
    report = check_directory(tmp_path)
    (problem,) = findings(report)
    assert "has no config.json" in problem.text
    assert {finding.subject for finding in findings(report, Status.OK)} >= {"shards", "tokenizer", "template"}
    assert [skip.subject for skip in findings(report, Status.SKIPPED)] == ["tensors"]


@pytest.mark.parametrize("kind", ["fp8", PACKED, PLAIN])
def test_quantised_checkpoints_are_sound(tmp_path: Path, kind: str) -> None:
    with safe_open(demo.path() / "model.safetensors", framework="np") as tensors:
        projections = sum(name.endswith("_proj.weight") for name in tensors.keys())
    report = check_directory(quantise(tmp_path, kind))
    assert findings(report) == [] and findings(report, Status.WARNING) == []
    (scales,) = [finding for finding in findings(report, Status.OK) if finding.subject == "scales"]
    assert scales.text.startswith(f"{2 * projections if kind == 'fp8' else projections} tensors, ")


@pytest.mark.parametrize("kind", ["fp8", PACKED, PLAIN])
def test_a_quantised_checkpoint_whose_config_does_not_say_so(tmp_path: Path, kind: str) -> None:
    edit_json(quantise(tmp_path, kind) / "config.json", quantization_config=None)
    found = {problem.subject for problem in findings(check_directory(tmp_path))}
    assert found >= {"unknown", "missing" if kind == PACKED else "types"}


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf])
def test_fp8_scales_that_are_none(tmp_path: Path, value: float) -> None:
    quantise(tmp_path, "fp8")
    scale = {f"{WEIGHT}weight_scale".replace(".", "__"): lambda t: torch.full_like(t, value)}
    change_tensors(tmp_path, **scale)
    problem = only_problem(tmp_path)
    assert problem.subject == "scales"
    assert problem.items == (f"{WEIGHT}weight_scale is {value:g}",)


def test_fp8_scales_missing_misshapen_or_odd(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{WEIGHT}input_scale"]
        tensors[f"{WEIGHT}weight_scale"] = torch.ones(128, 1)
        tensors["model.layers.1.mlp.experts.0.up_proj.weight_scale"] *= 1e5
        tensors["model.layers.1.mlp.experts.0.down_proj.weight_scale"] = torch.tensor([0.001])  # [1] is a scalar too
        tensors["model.layers.0.self_attn.attn.k_scale"] = torch.tensor(0.02)

    rewrite(quantise(tmp_path, "fp8"), change)
    report = check_directory(tmp_path)
    assert {problem.subject: problem.items for problem in findings(report)} == {
        "scales": (f"{WEIGHT}input_scale",),
        "shapes": (f"{WEIGHT}weight_scale is [128, 1], not []",),
    }
    (odd,) = findings(report, Status.WARNING)
    assert odd.items[0].startswith("model.layers.1.mlp.experts.0.up_proj.weight_scale is")


def test_a_projection_left_unquantised_and_not_ignored(tmp_path: Path) -> None:
    quantise(tmp_path, "fp8")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{WEIGHT}weight"] = tensors[f"{WEIGHT}weight"].bfloat16()

    rewrite(tmp_path, change)
    problem = only_problem(tmp_path)
    assert "1 are BF16 where" in problem.text and "ignored layers" in problem.remedy


def test_ignored_layers_of_which_half_is_named(tmp_path: Path) -> None:
    quantise(tmp_path, "fp8")
    edit_json(tmp_path / "config.json", quantization_config=FP8 | {"ignored_layers": [WEIGHT[:-1]]})
    assert "computed in one GEMM" in only_problem(tmp_path).text


@pytest.mark.parametrize("quantization", ["fp8", FP8 | {"ignored_layers": ["re:("]}, FP8 | {"ignored_layers": [1]}])
def test_a_quantisation_that_makes_no_sense(tmp_path: Path, quantization: object) -> None:
    edit_json(quantise(tmp_path, "fp8") / "config.json", quantization_config=quantization)
    assert only_problem(tmp_path).subject == "quantization_config"


def test_int8_scales_and_shapes(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{WEIGHT}weight_scale"][3:5] = 0
        tensors[f"{WEIGHT}weight_shape"] = torch.tensor([192, 128])

    rewrite(quantise(tmp_path, PACKED), change)
    found = {problem.subject: problem.items for problem in findings(check_directory(tmp_path))}
    assert found == {
        "scales": (f"{WEIGHT}weight_scale is 0, one of 2 in 128",),
        "weight_shape": (f"{WEIGHT}weight_shape says [192, 128], the weight is [128, 192]",),
    }


def test_a_quantisation_of_another_kind_is_refused(tmp_path: Path) -> None:
    edit_json(copy_demo(tmp_path) / "config.json", quantization_config={"quant_method": "hqq"})
    assert only_problem(tmp_path).subject == "quantization_config"
    assert [skip.subject for skip in findings(check_directory(tmp_path), Status.SKIPPED)] == ["tensors"]
