"""What a checkpoint is stored as: `check`, `plan` and `serve` say the same, because they ask in one place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import rewrite, tiny_config, write_checkpoint
from method_checkpoints import FORMATS, INT4, compressed, quantise
from typer.testing import CliRunner

from hunyuan_vllm.check.files import open_directory
from hunyuan_vllm.check.run import check_directory
from hunyuan_vllm.cli import app
from hunyuan_vllm.envs import Settings
from hunyuan_vllm.plan.model import open_planned
from hunyuan_vllm.quant.quantization_config import quantization_of, stored_format
from hunyuan_vllm.server.hardware import Machine
from hunyuan_vllm.server.launch import decide
from hunyuan_vllm.server.models import open_model
from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.server.parallel import choose_ranks
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Finding, Status

NETWORK: dict[str, Any] = dict(num_hidden_layers=2, intermediate_size=128, hidden_size=256)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model", tiny_config(**NETWORK))


def problems(directory: Path) -> list[Finding]:
    """What `check` finds wrong with the config and the tensors; there is no tokenizer here."""
    sections = [
        section for section in check_directory(directory).sections if section.title in ("Files", "Config", "Tensors")
    ]
    return [finding for section in sections for finding in section.findings if finding.status == Status.PROBLEM]


def refusal(command: Callable[..., object], *arguments: str) -> str:
    try:
        command(*arguments)
    except UserError as error:
        return str(error)
    return ""


def served(directory: str, ranks: str) -> None:
    choose_ranks(Settings.read({"TP_SIZE": ranks}), Flags([]), Machine(cuda=True, gpus=2), open_model(directory))


def answers(directory: Path) -> tuple[str, str, str]:
    """What `check`, `plan` and `serve` say against a checkpoint; "" where they take it."""
    checked = "; ".join(f"{problem.text}: {problem.remedy}" for problem in problems(directory))
    return checked, refusal(open_planned, str(directory)), refusal(open_model, str(directory))


PLACES = [
    *((form, "quantization_config") for form in FORMATS),
    *((form, "compression_config") for form in FORMATS if form.startswith("ct_")),
    *((form, "hf_quant_config.json") for form in FORMATS if form.startswith("modelopt")),
]


@pytest.mark.parametrize(("form", "where"), PLACES)
def test_what_is_loaded_is_sound_for_all(form: str, where: str, source: Path, tmp_path: Path) -> None:
    stored, _ = quantise(source, tmp_path, form, where)
    assert answers(stored) == ("", "", "")
    model, planned = open_model(str(stored)), open_planned(str(stored))
    assert model.format is not None and model.format.name == planned.format.name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes left over": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "left over, but the weights are not quantised: remove quantization_config from config.json",
    ),
    "MLX": ({"group_size": 64, "bits": 4}, "quantised for MLX (4 bits, a scale for 64 inputs)"),
    "GPTQ with desc_act": (FORMATS["gptq"][0] | {"desc_act": True}, "desc_act (groups in the order of activations)"),
    "GPTQ with 3 bits": (FORMATS["gptq"][0] | {"bits": 3}, "GPTQ is loaded with 4 or 8 bits"),
    "AWQ with a quantised head": (FORMATS["awq"][0] | {"lm_head": True}, "an unquantised head"),
    "int4 in an odd form": (
        compressed(INT4 | {"num_bits": 3}, "pack-quantized"),
        "(pack-quantized, 3 bits, int, group)",
    ),
    "ModelOpt's MXFP8": ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, "ModelOpt's MXFP8 is not served here"),
    "another tool's": ({"quant_method": "hqq"}, "quantization_config says 'hqq', which is not served here"),
    "nothing that means anything": ({"quant_method": "gptq"}, "an unknown form"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_all_in_the_same_words(name: str, source: Path, tmp_path: Path) -> None:
    described, message = REFUSED[name]
    write_checkpoint(tmp_path / "model", tiny_config(**NETWORK))
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": described}))
    checked, planned, served = answers(tmp_path / "model")
    assert message in checked
    assert checked in planned and checked in served


def test_an_mlx_config_says_it_twice() -> None:
    described = quantization_of({"quantization": {"group_size": 64, "bits": 4}, "num_hidden_layers": 2})
    with pytest.raises(ValueError, match="quantised for MLX"):
        stored_format(described)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(f"{name}.qweight"), "lacks checkpoint tensor '{name}.qweight'"),
        (lambda tensors, name: tensors.pop(f"{name}.scales"), "lacks checkpoint tensor '{name}.scales'"),
        (
            lambda tensors, name: tensors.update({f"{name}.scales": torch.ones(3, 3).bfloat16()}),
            "checkpoint tensor '{name}.scales' has shape [3, 3]",
        ),
        (
            lambda tensors, name: tensors.update({f"{name}.qweight": tensors[f"{name}.qweight"].float()}),
            "checkpoint tensor '{name}.qweight' is F32 where config.json promises I32",
        ),
        (
            lambda tensors, name: tensors.update({f"{name}.weight_packed": torch.ones(2)}),
            "checkpoint tensor '{name}.weight_packed' is not part of this network",
        ),
    ],
    ids=["no weight", "no scales", "shape", "type", "another format's"],
)
def test_tensors_of_a_method_are_named(change: Callable[..., Any], message: str, source: Path, tmp_path: Path) -> None:
    stored, _ = quantise(source, tmp_path, "gptq")
    name = "model.layers.1.mlp.experts.2.down_proj"
    rewrite(stored, lambda tensors: change(tensors, name))
    checked, _, served = answers(stored)
    assert message.format(name=name) in served
    assert checked


def test_layers_that_are_left_unquantised(source: Path, tmp_path: Path) -> None:
    """GPTQ and AWQ show it by their tensors; what the engine computes in one GEMM must be stored alike."""
    stored, _ = quantise(source, tmp_path / "whole", "awq", skip=("shared_mlp", "o_proj"))
    assert answers(stored) == ("", "", "")
    stored, _ = quantise(source, tmp_path / "part", "awq", skip=("shared_mlp.up_proj",))
    checked, _, served = answers(stored)
    assert "lacks checkpoint tensor 'model.layers.0.mlp.shared_mlp.up_proj.qweight'" in served
    assert checked


def test_ranks_that_cut_through_what_has_one_scale(tmp_path: Path) -> None:
    """Blocks and groups of 32: four ranks would have 24 of the MLP's 96 columns each, two 48."""
    source = write_checkpoint(tmp_path / "source", tiny_config(intermediate_size=96, num_key_value_heads=4))
    for form in ("fp8_block", "gptq", "ct_int4"):
        stored, _ = quantise(source, tmp_path, form)
        (said,) = [
            finding.text
            for section in check_directory(stored).sections
            for finding in section.findings
            if finding.subject == "ranks"
        ]
        assert said.startswith("tensor_parallel_size [1]: ")
        refused = refusal(served, str(stored), "2")
        assert "with 2 ranks each has 48" in refused
        result = CliRunner().invoke(app, ["plan", "--model", str(stored), "--gpus", "2", "--tp", "2", "--json"])
        assert json.loads(result.stdout)["problems"] == [refused]
        default = CliRunner().invoke(app, ["plan", "--model", str(stored), "--gpus", "2", "--json"])
        assert json.loads(default.stdout)["scenario"]["tensor_parallel_size"] == 1


def test_formats_for_gpus_only_are_refused_where_there_is_none(source: Path, tmp_path: Path) -> None:
    stored, _ = quantise(source, tmp_path, "modelopt_nvfp4")
    (stored / "tokenizer.json").touch()
    settings, machine = Settings.read({}), Machine(cuda=False, memory=2**35)
    with pytest.raises(UserError, match="NVFP4.*: vLLM loads it on GPUs only; for a CPU, convert"):
        decide(settings, Flags([]), machine, open_model(str(stored)), {})


DIRECTORIES: dict[str, tuple[list[str], str]] = {
    "GGUF": (["model-q4.gguf"], "has 'model-q4.gguf' of llama.cpp, which is not served"),
    "an adapter of MLX": (["adapters.safetensors", "adapter_config.json"], "is an adapter of MLX, not a checkpoint"),
    "an adapter": (["adapter_model.safetensors", "adapter_config.json"], "is an adapter, not a checkpoint"),
    "nothing": (["README.md"], "has no config.json"),
    "several": (["Instruct/config.json", "Pretrain/config.json"], "(Instruct, Pretrain): name one of them"),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_directories_that_are_no_checkpoint(name: str, tmp_path: Path) -> None:
    files, message = DIRECTORIES[name]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    for command in (open_directory, open_planned, open_model):
        with pytest.raises(UserError) as raised:
            command(str(tmp_path))
        assert message in str(raised.value)
