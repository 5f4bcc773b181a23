"""Int8 weights: the arithmetic, what is packed, and which checkpoints are taken for int8."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import rewrite, tiny_config, write_checkpoint
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from int8_reference import rounded, write_int8
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    pack_quantized_values_into_int32,
    unpack_quantized_values_into_int32,
)
from vllm.scalar_type import scalar_types

from hunyuan_vllm.checkpoint import check_headers
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError, Layout
from hunyuan_vllm.quant.formats import PACKED, PLAIN
from hunyuan_vllm.quant.int8 import Int8Config, Int8W8A8Config
from hunyuan_vllm.quant.layouts import IgnoredLayers
from hunyuan_vllm.quant.quantization_config import describe, int8, int8_form
from hunyuan_vllm.quant.rounding import pack_int8, quantize_per_channel, unpack_int8

Fields = dict[str, Any]
CONFIG = tiny_config()
Q_PROJ, EXPERT = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.experts.3.up_proj"


def weights(rows: int = 700, columns: int = 1024) -> torch.Tensor:
    """More than one block of `quantize_per_channel`, rows of very different size, one of them zero."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-6, 2, rows)[:, None]
    weight[5] = 0
    return weight.bfloat16()


def test_rounding() -> None:
    weight = weights()
    levels, scale = quantize_per_channel(weight)
    assert levels.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (700, 1)
    assert torch.equal(levels * scale, rounded(weight.float()))
    assert levels.min() >= -127 and (levels.abs().amax(1) == 127).sum() == 699  # every row but the zeros is filled
    assert ((levels * scale - weight).abs() <= scale * 0.5001).all()
    assert scale[5] == 1 and not levels[5].any()


def test_packing_is_compressed_tensors_and_vllms() -> None:
    levels, _ = quantize_per_channel(weights(64, 96))
    packed = pack_int8(levels)
    assert torch.equal(packed, pack_to_int32(levels, 8))
    assert torch.equal(packed, pack_quantized_values_into_int32(levels.int() + 128, scalar_types.uint8b128, 1))
    assert torch.equal(unpack_int8(packed, 96), levels)
    assert torch.equal(unpack_quantized_values_into_int32(packed, scalar_types.uint8b128, 1) - 128, levels.int())


def changed(form: str, **changes: Any) -> Fields:
    """A quantization_config, with fields of its only group or (by "weights_" and "input_") of what is in it changed."""
    config = describe(form)
    group = config["config_groups"]["group_0"]
    for name, value in changes.items():
        if name.startswith("weights_"):
            group["weights"][name.removeprefix("weights_")] = value
        elif name.startswith("input_"):
            group["input_activations"][name.removeprefix("input_")] = value
        else:
            (config if name in config else group)[name] = value
    return config


@pytest.mark.parametrize(
    ("config", "form"),
    [
        (describe(PACKED, ["lm_head"]), PACKED),
        (describe(PLAIN), PLAIN),
        (changed(PACKED, weights_observer="mse", weights_block_structure=None), PACKED),
        (changed(PACKED, weights_num_bits=4), None),
        (changed(PACKED, weights_strategy="group", weights_group_size=128), None),
        (changed(PACKED, weights_symmetric=False), None),
        (changed(PACKED, weights_type="float"), None),
        (changed(PACKED, weights_actorder="static"), None),
        (changed(PACKED, targets=["re:.*mlp.*"]), None),
        (changed(PACKED, kv_cache_scheme={"num_bits": 8, "type": "float"}), None),
        (changed(PLAIN, input_dynamic=False), None),
        (changed(PLAIN, input_strategy="tensor"), None),
        (changed(PLAIN, input_symmetric=False), None),
        (changed(PLAIN, weights_strategy="tensor"), None),
        (changed(PACKED, config_groups={}), None),
        (changed(PACKED, quant_method="gptq"), None),
        ({"quant_method": "fp8", "activation_scheme": "static"}, None),
    ],
)
def test_which_formats_are_ours(config: Fields, form: str | None) -> None:
    assert int8_form(config) == form


@pytest.mark.parametrize(
    ("form", "user", "model_type", "taken"),
    [
        (PACKED, None, "hunyuan", "hunyuan_int8"),
        (PLAIN, None, "hunyuan", "hunyuan_int8_w8a8"),
        (PACKED, "hunyuan_int8_w8a8", "hunyuan", "hunyuan_int8_w8a8"),
        (PLAIN, "hunyuan_int8", "hunyuan", "hunyuan_int8"),
        (PACKED, "compressed-tensors", "hunyuan", None),
        (PACKED, None, "llama", None),
        (PLAIN, "hunyuan_int8", "llama", None),
    ],
)
def test_who_takes_a_checkpoint(form: str, user: str | None, model_type: str, taken: str | None) -> None:
    hf_config = HunYuanConfig() if model_type == "hunyuan" else type("Config", (), {"model_type": model_type})()
    names = [
        config.override_quantization_method(describe(form), user, hf_config) for config in (Int8Config, Int8W8A8Config)
    ]
    assert {name for name in names if name} == ({taken} if taken else set())


def resolved(directory: Path, **options: Any) -> str | None:
    """The quantisation vLLM decides on."""
    return (
        EngineArgs(model=str(directory), skip_tokenizer_init=True, **options).create_engine_config().quant_config.name
    )


def test_vllm_finds_them(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", CONFIG)
    assert resolved(source, quantization="hunyuan_int8") == "hunyuan_int8"
    assert resolved(write_int8(source, tmp_path / "packed", PACKED)) == "hunyuan_int8"
    assert resolved(write_int8(source, tmp_path / "plain", PLAIN)) == "hunyuan_int8_w8a8"
    four_bits = write_int8(source, tmp_path / "four", PACKED)
    config = json.loads((four_bits / "config.json").read_text())
    config["quantization_config"] = changed(PACKED, weights_num_bits=4)
    (four_bits / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"\(compressed-tensors\) does not match .* \(hunyuan_int8\)"):
        resolved(four_bits, quantization="hunyuan_int8")


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="quantization='hunyuan_int8' is for Hunyuan checkpoints; some/llama is"):
        Int8Config().maybe_update_config("some/llama", hf_config=type("Config", (), {"model_type": "llama"})())


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint in both forms."""
    directory = tmp_path_factory.mktemp("stored")
    source = write_checkpoint(directory / "source", CONFIG)
    return {form: write_int8(source, directory / form, form) for form in (PACKED, PLAIN)}


Change = Callable[[dict[str, torch.Tensor]], Any]


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        (PACKED, lambda tensors: None, None),
        (PACKED, lambda tensors: tensors.pop(f"{Q_PROJ}.weight_shape"), None),
        (PACKED, lambda tensors: tensors.update({f"{Q_PROJ}.bias": torch.ones(128)}), None),
        (PLAIN, lambda tensors: None, None),
        (PACKED, lambda tensors: tensors.pop(f"{Q_PROJ}.weight_packed"), f"lacks .*{Q_PROJ}.weight_packed"),
        (PLAIN, lambda tensors: tensors.pop(f"{EXPERT}.weight_scale"), f"lacks .*{EXPERT}.weight_scale"),
        (
            PACKED,
            lambda tensors: tensors.update({f"{EXPERT}.weight_scale": torch.ones(1)}),
            rf"{EXPERT}.weight_scale' has shape \[1\]; this config needs \[96, 1\]",
        ),
        (
            PLAIN,
            lambda tensors: tensors.update({f"{EXPERT}.weight": torch.ones(96, 128).bfloat16()}),
            f"{EXPERT}.weight' is BF16 where .* promises I8",
        ),
        (
            PLAIN,
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(128).to(torch.int8)}),
            "model.norm.weight' is I8 where .* promises BF16 or F16 or F32",
        ),
    ],
)
def test_headers(form: str, change: Change, message: str | None, stored: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / "changed"
    directory.mkdir()
    for file in stored[form].iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    rewrite(directory, change)
    layout = int8(form, IgnoredLayers()).layout(CONFIG)
    if message is None:
        assert check_headers(directory, layout) >= len(layout.expected)
    else:
        with pytest.raises(CheckpointError, match=message):
            check_headers(directory, layout)


def test_a_linear_left_alone() -> None:
    layout = int8(PACKED, IgnoredLayers([Q_PROJ, "lm_head"])).layout(CONFIG)
    assert f"{Q_PROJ}.weight" in layout.expected and f"{Q_PROJ}.weight_packed" not in layout.known
    assert Layout(CONFIG).expected[f"{EXPERT}.weight"] == (96, 128)
    assert layout.expected[f"{EXPERT}.weight_packed"] == (96, 32)
    with pytest.raises(CheckpointError, match="computed in one GEMM"):
        int8(PACKED, IgnoredLayers([EXPERT])).layout(CONFIG)


@pytest.mark.parametrize(
    ("config", "name", "tensor", "message"),
    [
        (Int8Config(), "weight", torch.ones(96, 128).to(torch.int8), "is torch.int8 and should be torch.bfloat16"),
        (Int8Config(PLAIN), "weight", torch.ones(96, 128), "is torch.float32 and should be torch.int8"),
        (Int8Config(PACKED), "weight_packed", torch.ones(96, 32), "is torch.float32 and should be torch.int32"),
        (Int8Config(PLAIN), "weight_scale", torch.tensor([[1.0], [0.0]]), "holds scales that are not positive"),
        (
            Int8Config(PLAIN),
            "weight_scale",
            torch.tensor([[1.0], [float("nan")]]),
            "holds scales that are not positive",
        ),
    ],
)
def test_values_of_no_use_are_named(config: Int8Config, name: str, tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"{EXPERT}.{name}' {message}"):
        list(config.load(f"{EXPERT}.{name}", tensor))
