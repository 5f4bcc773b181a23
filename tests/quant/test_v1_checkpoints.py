"""Quantised checkpoints of the V1 family as they are published: A13B-like experts and dense networks.

FP8 in compressed-tensors' "naive-quantized", with either spelling of the list of unquantised layers, and KV-cache
scales in a file of their own; GPTQ, AWQ and compressed-tensors with 4 bits are in test_method_formats.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import engine, random_prompts, score
from fp8_reference import fp8_answers, write_fp8
from golden_data import FLOAT32_TOLERANCE, GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

from hunyuan_vllm.checkpoint import check_headers
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError
from hunyuan_vllm.quant.fp8 import HunYuanFp8Config
from hunyuan_vllm.quant.layouts import is_quantised
from hunyuan_vllm.quant.quantization_config import read_format
from hunyuan_vllm.quant.schemes import SCHEMES
from hunyuan_vllm.quantize.convert import quantize_checkpoint
from hunyuan_vllm.server.models import check_scheme, open_model

PROMPTS = random_prompts(302, [8] * 48)
NETWORKS = ["v1_a13b", "v1_moe_tf", "v1_7b", "v1_1_8b"]


def published(kv_cache: bool = False, ignored: str = "ignore", layers: tuple[str, ...] = ("lm_head",)) -> dict:
    """The quantization_config of the FP8 files on the hubs."""
    scale: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    static = scale | {"dynamic": False}
    group = {"targets": ["Linear"], "weights": static, "input_activations": static, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "naive-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "kv_cache_scheme": scale if kv_cache else None, ignored: list(layers),
    }  # fmt: skip


def write_published(source: Path, directory: Path, cache_scales: bool = False, **config: Any) -> Path:
    """The FP8 form of a golden checkpoint in the published layout: `[1]` scales, the router in the list."""

    def one_dimensional(tensors: dict[str, Tensor]) -> None:
        scales = {name: tensor.reshape(1) for name, tensor in tensors.items() if name.endswith("_scale")}
        tensors |= scales | {"lm_head.weight": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)}

    write_fp8(source, directory, PROMPTS, change=one_dimensional)
    fields = json.loads((directory / "config.json").read_text())
    layers = range(fields["num_hidden_layers"])
    routers = [f"model.layers.{layer}.mlp.gate.wg" for layer in layers] if "a13b" in source.name else []
    fields["quantization_config"] = published(cache_scales, layers=("lm_head", *routers), **config)
    (directory / "config.json").write_text(json.dumps(fields))
    (directory / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')  # TensorRT's
    if cache_scales:
        # An index that leaves the file of scales out, and vLLM then does not read it.
        weights = load_file(directory / "model.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        names = {f"model.layers.{n}.self_attn.{part}_cache.scale": 0.02 + n / 100 for n in layers for part in "kv"}
        scales = {name: torch.tensor([scale]) for name, scale in names.items()}
        save_file(scales, directory / "kv_cache_scales.safetensors")
    return directory


@pytest.mark.parametrize("ignored", ["ignore", "ignored_layers"])
@pytest.mark.parametrize("network", NETWORKS)
def test_published_fp8_files_are_sound(network: str, ignored: str, tmp_path: Path) -> None:
    directory = write_published(GOLDEN / network, tmp_path / "fp8", ignored=ignored)
    (directory / "tokenizer.json").touch()
    model = open_model(str(directory))
    assert model.format is not None and (model.format.scheme, model.format.ours) == ("fp8", True)
    check_scheme(SCHEMES["fp8"], model)
    config = HunYuanConfig.from_pretrained(directory)
    described = config.quantization_config
    assert HunYuanFp8Config.override_quantization_method(described, None, config) == "hunyuan_fp8"


def test_cache_scales_in_a_file_of_their_own(tmp_path: Path) -> None:
    directory = write_published(GOLDEN / "v1_7b", tmp_path / "fp8", cache_scales=True)
    config = HunYuanConfig.from_pretrained(directory)
    quantization = HunYuanFp8Config.from_config(config.quantization_config)
    quantization.maybe_update_config(str(directory), config)
    assert [quantization.cache_scales.v(layer) for layer in (0, 1)] == pytest.approx([0.02, 0.03])
    # Without an index it is one of the checkpoint's files.
    (directory / "model.safetensors.index.json").unlink()
    assert check_headers(directory, read_format(config.to_dict()).layout(config))
    name = "model.layers.0.self_attn.v_cache.scale"
    save_file({name: torch.ones(2)}, directory / "kv_cache_scales.safetensors")
    with pytest.raises(CheckpointError, match=rf"kv_cache_scales\.safetensors: '{name}' has shape \[2\]"):
        quantization.maybe_update_config(str(directory), config)
    (directory / "kv_cache_scales.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read .* download it again"):
        quantization.maybe_update_config(str(directory), config)


@pytest.mark.engine
@pytest.mark.parametrize(("network", "ignored"), [("v1_a13b", "ignore"), ("v1_7b", "ignored_layers")])
def test_the_engine_computes_what_published_fp8_files_stand_for(network: str, ignored: str, tmp_path: Path) -> None:
    source = GOLDEN / network
    directory = write_published(source, tmp_path / "fp8", cache_scales=True, ignored=ignored)
    answers = fp8_answers(source, directory, PROMPTS)
    with engine(directory, kv_cache_dtype="auto") as llm:
        assert llm.llm_engine.vllm_config.model_config.quantization == "hunyuan_fp8"
        results = score(llm, PROMPTS)
    ours = torch.tensor([result.prompt_logprobs for result in results])
    wanted = torch.tensor([item.prompt_logprobs for item in answers.items])
    assert ((ours - wanted).abs() <= FLOAT32_TOLERANCE).float().mean() > 0.85


@pytest.mark.parametrize("scheme", ["fp8", "int8", "int8-w8a8"])
@pytest.mark.parametrize("network", ["v1_a13b", "v1_7b"])
def test_v1_checkpoints_are_quantised(network: str, scheme: str, tmp_path: Path) -> None:
    documents = [torch.randint(3, 300, (60,), generator=torch.Generator().manual_seed(3)).tolist()]
    report = quantize_checkpoint(GOLDEN / network, tmp_path / "dst", scheme, calibration=documents)
    assert max(one["relative_error"] for one in report["projections"]) < (0.04 if scheme == "fp8" else 0.01)
    fields = json.loads((tmp_path / "dst" / "config.json").read_text())
    source = json.loads((GOLDEN / network / "config.json").read_text())
    assert {name: fields[name] for name in source} == source
    config, form = HunYuanConfig.from_pretrained(tmp_path / "dst"), read_format(fields)
    assert form.scheme == scheme and check_headers(tmp_path / "dst", form.layout(config))
    quantised = {name for name in load_file(GOLDEN / network / "model.safetensors") if is_quantised(name)}
    assert {f"{one['projection']}.weight" for one in report["projections"]} == quantised
