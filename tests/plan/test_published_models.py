"""Plans of the published models, against the figures published or computed for them."""

import json
from pathlib import Path
from typing import Any

import pytest
from meta_model import meta_model, parameter_bytes
from scenarios import QUANTISED
from typer.testing import CliRunner

from hunyuan_vllm.check.configs import parameters
from hunyuan_vllm.cli import app
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.kv_cache import CacheShape
from hunyuan_vllm.layout import tensor_parallel_sizes
from hunyuan_vllm.plan.fit import check_fit, problems
from hunyuan_vllm.plan.memory import rank_weights
from hunyuan_vllm.plan.model import DATA, PUBLISHED, open_planned
from hunyuan_vllm.plan.plan import make_scenario, serve_command
from hunyuan_vllm.plan.schemes import SCHEMES
from hunyuan_vllm.util.text import GIB

V1 = [name for name in PUBLISHED if name != "hunyuan-large"]


def plan(*arguments: str) -> dict[str, Any]:
    return json.loads(CliRunner().invoke(app, ["plan", *arguments, "--json"]).stdout)


@pytest.mark.parametrize(
    ("name", "billions", "gib", "kib"),
    [
        ("hunyuan-large", 388.7, 724.0, 80),
        ("hunyuan-a13b", 80.39, 149.8, 128),
        ("hunyuan-7b", 7.50, 14.0, 128),
        ("hunyuan-4b", 4.22, 7.9, 144),
        ("hunyuan-1.8b", 1.79, 3.4, 64),
        ("hunyuan-0.5b", 0.54, 1.1, 96),
    ],
)
def test_sizes(name: str, billions: float, gib: float, kib: int) -> None:
    """Weights are a little more than the parameters: routers are float32, and there is a rotary table."""
    config = open_planned(name).config
    assert parameters(config)[0] / 1e9 == pytest.approx(billions, abs=0.06 if billions > 100 else 0.006)
    assert rank_weights(config, SCHEMES["bf16"], 1).total / GIB == pytest.approx(gib, abs=0.06)
    cache = CacheShape.of(config, tensor_parallel=1, stage=range(config.num_hidden_layers), itemsize=2)
    assert cache.bytes_per_token == kib * 1024


def test_a13b_uses_13_billion_parameters_a_token() -> None:
    assert round(parameters(open_planned("hunyuan-a13b").config)[1] / 1e9) == 13


@pytest.mark.parametrize("name", V1)
@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8"])
def test_weights_are_those_of_the_real_model(name: str, scheme: str) -> None:
    config = open_planned(name).config
    weights = rank_weights(config, SCHEMES[scheme], 4)
    with meta_model(HunYuanConfig.from_pretrained(DATA / name), tensor_parallel=4, **QUANTISED[scheme]) as model:
        assert weights.parameters == parameter_bytes(model)
        assert weights.buffers == sum(buffer.nbytes for buffer in model.buffers())


def test_a13b_on_two_gpus_of_96_gb() -> None:
    fit = check_fit(make_scenario("hunyuan-a13b", "H20", gpus=2))
    assert fit.fits and fit.scenario.tensor == 2
    assert fit.tightest.weights.total / GIB == pytest.approx(149.7 / 2, abs=0.1)
    assert fit.shared.bytes_per_token == 64 * 1024  # half of the KV heads
    int4 = make_scenario("hunyuan-a13b", "H100", scheme="int4")
    assert check_fit(int4).fits and int4.gpus == 1
    assert check_fit(int4).tightest.weights.total / GIB == pytest.approx(40, abs=1)


def test_ranks_of_a13b() -> None:
    """3072 columns an expert; GPTQ's groups of 128 divide them up to 8 ranks."""
    assert tensor_parallel_sizes(open_planned("hunyuan-a13b").config) == [1, 2, 4, 8, 16, 32]
    for ranks, scheme, possible in ((8, "int4", True), (16, "int4", False), (16, "bf16", True), (3, "bf16", False)):
        scenario = make_scenario("hunyuan-a13b", "H100", gpus=ranks, tensor=ranks, scheme=scheme)
        assert (not problems(scenario)) == possible, problems(scenario)


def test_a_long_context_costs_cache_and_a_rotary_table() -> None:
    short, long = (
        plan("--model", "hunyuan-a13b", "--gpus", "4", *flags) for flags in ([], ["--max-model-len", "262144"])
    )
    assert (short["scenario"]["max_model_len"], long["scenario"]["max_model_len"]) == (32768, 262144)
    table = long["stages"][0]["weight_buffer_bytes"] - short["stages"][0]["weight_buffer_bytes"]
    assert table == 2 * 128 * (262144 - 32768)
    assert long["concurrency"][-1] == {
        "length": 262144,
        "shared": long["kv_cache"]["tokens"] // 262144,
        "unshared": long["kv_cache"]["tokens"] // 262144,
    }
    assert "--max-model-len 262144" in long["command"]
    too_long = plan("--model", "hunyuan-7b", "--gpus", "1", "--max-model-len", "262145")
    assert not too_long["fits"] and "use at most 262144" in too_long["problems"][0]


@pytest.mark.parametrize("name", V1)
def test_by_config_as_by_name(name: str, tmp_path: Path) -> None:
    """Also as transformers 5 writes it, and as A13B's is published elsewhere."""
    fields = json.loads((DATA / name / "config.json").read_text())
    fields["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": fields.pop("rope_theta"), "alpha": 1000.0}
    fields["rope_parameters"]["factor"] = fields.pop("rope_scaling")["factor"]
    if name == "hunyuan-a13b":
        fields |= {"model_type": "hunyuan", "attention_head_dim": fields.pop("head_dim"), "auto_map": {}}
        fields |= {field: 32 * [fields[field]] for field in ("moe_topk", "num_shared_expert", "moe_intermediate_size")}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    by_name, by_config = (plan("--model", model, "--gpus", "2") for model in (name, str(tmp_path)))
    assert by_config["fits"] and by_config["stages"] == by_name["stages"]
    assert by_config["kv_cache"] == by_name["kv_cache"]


def test_commands_name_the_published_checkpoints() -> None:
    for scheme, checkpoint in (
        ("bf16", "Instruct"),
        ("int8", "Instruct"),
        ("fp8", "Instruct-FP8"),
        ("int4", "Instruct-GPTQ-Int4"),
    ):
        command = serve_command(make_scenario("hunyuan-a13b", "H200", gpus=1, scheme=scheme))
        assert command.startswith(f"MODEL_PATH=/models/Hunyuan-A13B-{checkpoint} ")


def test_the_table_of_models() -> None:
    lines = CliRunner().invoke(app, ["plan", "--list-models"]).stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("| hunyuan")]
    assert {row[0] for row in rows} == {*PUBLISHED} and all(len(row) == 9 for row in rows)
    a13b = {row[1]: row for row in rows if row[0] == "hunyuan-a13b"}
    assert a13b["`run_server.sh`"][7] == "2 (154K)" and a13b["`run_server_int4.sh`"][6].startswith("1 (")
