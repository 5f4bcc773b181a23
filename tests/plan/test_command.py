"""`hunyuan-vllm plan` as a user runs it: what it says, what it exits with, and what it makes of mistakes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import published_json, tiny_config
from click.testing import Result
from scenarios import FP8_CONFIG, planned
from typer.testing import CliRunner
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from hunyuan_vllm.cli import app
from hunyuan_vllm.plan.hardware import find_gpu, known_gpus
from hunyuan_vllm.plan.plan import serve_command, serve_flags
from hunyuan_vllm.plan.schemes import SCHEMES
from hunyuan_vllm.quant.formats import PACKED
from hunyuan_vllm.quant.quantization_config import describe
from hunyuan_vllm.util.errors import UserError


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "100"})


def plan(*arguments: str) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json").stdout)


def refusal(*arguments: str) -> str:
    """The one line that the command prints, with exit status 2."""
    result = run(*arguments)
    assert isinstance(result.exception, UserError), (result.exception, result.stdout)
    return str(result.exception)


def test_the_first_screen_answers() -> None:
    result = run("--gpu", "H20", "--gpus", "16", "--tp", "16", "--max-model-len", "131072")
    assert result.exit_code == 0
    for answer in (
        "It fits. The cache holds 4,111,024 tokens: 31 sequences of 131,072.",
        "weights      45.33",
        "KV cache     39.21 10 KiB per token and rank",
        "with CLA's shared cache 2,007   501    125      31 4,111,024",
        "without                 1,003   250     62      15 2,055,504",
        "Batch 1: at most 614 tokens/s (bound), estimated 20–94, published 20.2.",
        "Batch 4: at most 1,137 tokens/s (bound), estimated 74–304, published 75.5.",
        "The estimate has not been validated on GPUs",
        "TP_SIZE=16 LOCAL_IP=10.0.0.5 hunyuan-vllm serve --max-model-len 131072",
    ):
        assert answer in result.stdout


@pytest.mark.parametrize("sequences", [16, 31, 32])
def test_the_largest_batch_is_in_the_table(sequences: int) -> None:
    result = run("--gpu", "H20", "--gpus", "16", "--tp", "16", "--max-num-seqs", str(sequences))
    table = result.stdout.partition("Decoding, ")[2].partition("Prefill")[0].splitlines()
    assert [line.split()[0] for line in table if line[:1].isdigit() or line.strip()[:1].isdigit()][-1] == str(sequences)


def test_what_does_not_fit_says_what_to_change() -> None:
    result = run("--gpu", "H100", "--gpus", "8")
    assert result.exit_code == 1
    assert "It does not fit: the weights take 90.5 GiB per GPU, and vLLM may use 72.8 GiB" in result.stdout
    title, remedy = result.stdout.partition("What to change, cheapest first")[2].splitlines()[:2]
    assert not title.strip() and remedy.startswith("--scheme int8 ")
    assert "Start it with" not in result.stdout


def test_what_cannot_work_says_why() -> None:
    result = run("--gpu", "H20", "--gpus", "12", "--tp", "12")
    assert result.exit_code == 1 and "It cannot run: tensor_parallel_size=12 does not divide" in result.stdout


def test_json_holds_what_the_screen_shows() -> None:
    document = plan("--gpu", "H20", "--gpus", "16", "--tp", "16", "--dcp", "2", "--kv", "fp8")
    assert document["fits"] and document["scenario"]["decode_context_parallel_size"] == 2
    (stage,) = document["stages"]
    assert stage["weight_parameter_bytes"] == sum(stage["weight_parts_bytes"].values()) == 48647406080
    assert document["kv_cache"]["blocks"] == stage["kv_cache_bytes"] // (16 * 5 * 1024)
    assert document["kv_cache"]["tokens"] == (document["kv_cache"]["blocks"] - 1) * 32
    assert [point["batch"] for point in document["decode"][:3]] == [1, 2, 4]
    assert document["decode"][0]["step"]["all_reduce_bytes"] == 12800


def test_the_fewest_gpus_are_found() -> None:
    """389B in BF16 are 724 GiB, and an H20 has 87.4 for vLLM: 8 do not hold them."""
    document = plan("--gpu", "H20")
    assert document["fits"] and document["scenario"]["gpus"] == 16
    assert plan("--gpu", "H20", "--scheme", "int8")["scenario"]["gpus"] == 8
    assert plan("--gpu", "B200", "--scheme", "fp8")["scenario"]["gpus"] == 4
    shared = plan("--gpu", "H20", "--dcp", "2")["scenario"]
    assert (shared["gpus"], shared["tensor_parallel_size"]) == (16, 16)
    nowhere = plan("--gpu", "V100")
    assert not nowhere["fits"] and nowhere["scenario"]["gpus"] == 64


def test_without_tp_all_gpus_share_a_layer() -> None:
    assert plan("--gpu", "H20", "--gpus", "16")["scenario"]["tensor_parallel_size"] == 16
    assert plan("--gpu", "H20", "--gpus", "16", "--pp", "2")["scenario"]["tensor_parallel_size"] == 8
    assert plan("--gpu", "H200", "--gpus", "12")["scenario"]["tensor_parallel_size"] == 8


def test_a_checkpoint_names_its_scheme(tmp_path: Path) -> None:
    fields = published_json(tiny_config())
    for quantization, scheme in ((None, "bf16"), (FP8_CONFIG, "fp8"), (describe(PACKED), "int8")):
        (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": quantization}))
        for given in (tmp_path, tmp_path / "config.json"):
            document = plan("--model", str(given), "--gpus", "1")
            assert document["scenario"]["scheme"] == scheme
    assert "is already quantised to int8: leave --scheme out" in refusal("--model", str(tmp_path), "--scheme", "fp8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "H2O"], "--gpu H2O is not known: use one of H20, "),
        (["--gpu", "/no/such.json"], "--gpu /no/such.json cannot be read: No such file"),
        (["--model", "/no/such"], "--model /no/such does not exist: give a directory with a config.json"),
        (["--scheme", "int2"], "--scheme int2 is not known here: use one of bf16, int8, int8-w8a8, fp8, int4"),
        (["--max-num-batched-tokens", "64", "--max-num-seqs", "128"], "64 is below --max-num-seqs 128"),
        (
            ["--input-len", "2048", "--output-len", "256", "--max-model-len", "2100"],
            "--input-len 2048 and --output-len 256 are together longer than .* 2100",
        ),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    said = refusal(*arguments)
    assert all(piece.strip() in said for piece in message.split(".*")) and "\n" not in said


def test_files_that_are_no_config(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    for text, message in (
        ("{", "is not JSON"),
        ('{"model_type": "llama"}', "has model_type 'llama'; Hunyuan checkpoints have one of hunyuan,"),
        ('{"model_type": "hunyuan", "num_experts": -1}', "num_experts is -1"),
        (
            '{"model_type": "hunyuan", "quantization_config": {"quant_method": "hqq"}}',
            "'hqq', which is not served here",
        ),
    ):
        config.write_text(text)
        said = refusal("--model", str(tmp_path))
        assert all(piece.strip() in said for piece in message.split(".*")), said


def test_a_gpu_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(find_gpu("H200").model_copy(update={"name": "H300", "memory_gib": 300.0}).model_dump_json())
    assert plan("--gpu", str(path), "--gpus", "4")["fits"]
    path.write_text('{"name": "half"}')
    assert refusal("--gpu", str(path)).startswith(f"--gpu {path}: capability: ")


def test_the_tables_are_shown() -> None:
    result = run("--list-gpus")
    assert result.exit_code == 0 and all(gpu.name in result.stdout for gpu in known_gpus())


def test_layers_that_a_checkpoint_leaves_unquantised_are_noted(tmp_path: Path) -> None:
    for ignored, noted in ((["lm_head"], False), (["lm_head", "model.layers.0.self_attn.q_proj"], True)):
        fields = published_json(tiny_config()) | {"quantization_config": FP8_CONFIG | {"ignored_layers": ignored}}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        notes = plan("--model", str(tmp_path), "--gpus", "1")["notes"]
        assert any("leaves model.layers.0.self_attn.q_proj unquantised" in note for note in notes) == noted


def test_requests_are_as_long_as_the_model_takes_unless_told() -> None:
    """The published workload where it fits."""
    sizes = ("input_len", "output_len")
    assert [plan("--gpus", "16")["scenario"][name] for name in sizes] == [2048, 256]
    assert [plan("--gpus", "16", "--max-model-len", "1024")["scenario"][name] for name in sizes] == [896, 128]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_vllm_takes_the_flags_of_the_command(scheme: str) -> None:
    scenario = planned(
        scheme=scheme, tensor=8, pipeline=2, dcp=2, kv="fp8", utilization=0.9, sequences=64, eager=True
    ).changed(batched_tokens=4096)
    parser = make_arg_parser(FlexibleArgumentParser())
    parsed = parser.parse_args(["--model", "x", *serve_flags(scenario)])
    assert (parsed.pipeline_parallel_size, parsed.decode_context_parallel_size) == (2, 2)
    assert (parsed.max_num_batched_tokens, parsed.max_num_seqs, parsed.enforce_eager) == (4096, 64, True)
    assert (parsed.gpu_memory_utilization, parsed.kv_cache_dtype, parsed.max_model_len) == (0.9, "fp8", 131072)


def test_the_command_names_what_the_cut_needs() -> None:
    words = shlex.split(serve_command(planned(gpus=24, tensor=8, pipeline=3)))
    assert "VLLM_PP_LAYER_PARTITION=22,22,20" in words and "TP_SIZE=8" in words
    assert not any("PARTITION" in word for word in shlex.split(serve_command(planned(tensor=8, pipeline=2))))


def test_the_command_names_a_checkpoint_that_is_there(tmp_path: Path) -> None:
    assert serve_command(planned(scheme="fp8")).startswith("MODEL_PATH=/models/Hunyuan-A52B-Instruct-FP8 ")
    assert "MODEL_PATH" not in plan("--model", "demo", "--gpu", "L40S", "--gpus", "1")["command"]
    fp8 = plan("--model", "demo", "--gpu", "L40S", "--gpus", "1", "--scheme", "fp8")
    assert fp8["command"].startswith("MODEL_PATH=demo-FP8 ")
    assert any(note.endswith("hunyuan-vllm quantize demo demo-FP8 --scheme fp8") for note in fp8["notes"])
    (tmp_path / "config.json").write_text(json.dumps(published_json(tiny_config())))
    document = plan("--model", f"{tmp_path}/", "--gpus", "1", "--scheme", "fp8")
    make = f"hunyuan-vllm quantize {tmp_path}/ {tmp_path}-FP8 --scheme fp8"
    assert any(note.endswith(make) for note in document["notes"])
    assert document["command"].startswith(f"MODEL_PATH={tmp_path}-FP8 ")
    assert plan("--model", str(tmp_path), "--gpus", "1")["command"].startswith(f"MODEL_PATH={tmp_path} ")


def test_it_runs_without_loading_vllm() -> None:
    """A laptop's answer in seconds, and without an engine installed beside transformers."""
    program = (
        "import sys; from hunyuan_vllm.cli import main; sys.argv = ['hunyuan-vllm', 'plan', '--gpu', 'H20', '--json']\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code in (0, None)\n"
        "assert not any(name.split('.')[0] == 'vllm' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_several_engines_are_counted():
    said = run("--gpu", "H20", "--gpus", "32", "--tp", "16").stdout
    assert "32 × H20 (2 engines, each tensor 16, 2 nodes)" in said and "2 clusters, one per engine" in said
