"""Serving quantised: which checkpoint, which options, how many GPUs; and the demo model, converted and asked."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from engine import FP8_CACHE
from launches import CPU, DEMO, GIB, GPU8, HUB, LARGE, MODEL, NODE1, SMALL, parsed
from serving import running_server

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.envs import Settings
from hunyuan_vllm.quant.quantization_config import stored_format
from hunyuan_vllm.quant.schemes import FP8, INT4, find_scheme
from hunyuan_vllm.server.hardware import Machine
from hunyuan_vllm.server.launch import Launch, decide
from hunyuan_vllm.server.models import ModelSource, convert, demo_in, demo_model, open_model
from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.util.errors import UserError

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
FP8_LARGE = replace(
    MODEL,
    config=HunYuanConfig(**LARGE.to_diff_dict() | {"quantization_config": STATIC}),
    format=stored_format(STATIC),
)
FP8_SMALL = replace(FP8_LARGE, weight_bytes=4 * GIB)


def launch(machine: Machine, model: ModelSource, *flags: str, **environ: str) -> Launch:
    return decide(Settings.read(environ), Flags(flags), machine, model, environ, scheme=FP8)


@pytest.mark.parametrize(
    ("machine", "model", "flags", "environ", "expected"),
    [
        (GPU8, FP8_LARGE, [], {}, {"tensor_parallel_size": 8, "kv_cache_dtype": "fp8", "quantization": None}),
        (NODE1, FP8_LARGE, [], {}, {"tensor_parallel_size": 8, "distributed_executor_backend": None}),
        (NODE1, FP8_LARGE, [], {"TP_SIZE": "16"}, {"tensor_parallel_size": 16}),
        (NODE1, FP8_LARGE, ["-tp", "16"], {}, {"tensor_parallel_size": 16}),
        (NODE1, HUB, [], {}, {"tensor_parallel_size": 8, "kv_cache_dtype": "fp8"}),
        (GPU8, FP8_LARGE, ["--kv-cache-dtype", "auto"], {}, {"kv_cache_dtype": "auto"}),
        (CPU, DEMO, [], {}, {"tensor_parallel_size": 1, "kv_cache_dtype": "fp8", "kv_cache_memory_bytes": 256 * 2**20}),
        (replace(CPU, fp8_cache=False), DEMO, [], {}, {"kv_cache_dtype": "auto"}),
        (replace(CPU, fp8_cache=False), DEMO, ["--kv-cache-dtype", "fp8"], {}, {"kv_cache_dtype": "fp8"}),
        # Expanded weights take twice the file's size.
        (CPU, FP8_SMALL, ["--kv-cache-dtype", "auto"], {}, {"kv_cache_memory_bytes": 4 * GIB}),
        (replace(CPU, memory=16 * GIB), FP8_SMALL, [], {}, {"kv_cache_memory_bytes": 3 * GIB}),
    ],
)
def test_decision(machine: Machine, model: ModelSource, flags: list, environ: dict, expected: dict) -> None:
    arguments = vars(parsed(launch(machine, model, *flags, **environ)))
    assert {name: arguments[name] for name in expected} == expected


def test_idle_gpus_are_mentioned() -> None:
    assert launch(NODE1, FP8_LARGE).notes == ["using 8 of 16 GPUs: set TP_SIZE for more"]


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (None, "is unquantised, and --scheme fp8 serves an FP8 checkpoint: make one with hunyuan-vllm quantize /mo"),
        (GPTQ, "is GPTQ, .*, and --scheme fp8 serves an FP8 checkpoint: deploy/run_server.sh serves it as it is"),
    ],
)
def test_checkpoints_of_another_kind(described: dict | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch(GPU8, stored_as(described))


def stored_as(described: dict | None) -> ModelSource:
    config = HunYuanConfig(**LARGE.to_diff_dict() | ({"quantization_config": described} if described else {}))
    return replace(SMALL, config=config, format=stored_format(described))


def test_dynamic_fp8_is_served_with_an_fp8_cache() -> None:
    arguments = parsed(launch(GPU8, stored_as(STATIC | {"activation_scheme": "dynamic"})))
    assert arguments.kv_cache_dtype == "fp8" and arguments.quantization is None


def test_4_bit_checkpoints() -> None:
    def start(model: ModelSource) -> Launch:
        return decide(Settings.read({}), Flags([]), GPU8, model, {}, scheme=INT4)

    arguments = parsed(start(stored_as(GPTQ)))
    assert arguments.quantization is None and arguments.kv_cache_dtype == "auto"
    for model, remedy in [
        (stored_as(None), r"is unquantised, and --scheme int4 serves a 4-bit checkpoint.*run_server_int8\.sh"),
        (stored_as(STATIC), r"is FP8 .*, and --scheme int4 serves a 4-bit .*: deploy/run_server\.sh serves it"),
    ]:
        with pytest.raises(UserError, match=remedy):
            start(model)


def test_schemes_by_name() -> None:
    assert find_scheme("fp8") is FP8 and find_scheme("fp8-w8a8c8") is FP8
    with pytest.raises(UserError, match="--scheme fp4 is not known here: use one of bf16, int8, int8-w8a8, fp8, int4"):
        find_scheme("fp4")


@pytest.mark.server
def test_the_demo_model_is_converted_once_and_answers(tmp_path: Path) -> None:
    source = demo_model()
    made = demo_in(FP8, source, tmp_path)
    with running_server("--scheme", "fp8", XDG_CACHE_HOME=str(tmp_path)) as server:
        asked = subprocess.run(
            ["sh", ROOT / "deploy" / "openapi.sh", "--raw"], capture_output=True, text=True, timeout=120,
            env={**os.environ, "PORT": str(server.port)},
        )  # fmt: skip
        assert asked.returncode == 0 and '"finish_reason":"stop"' in asked.stdout, asked.stderr
        said = server.said
    assert f"converting the demo model to fp8, once: {made.name}" in said
    assert "quantization=hunyuan_fp8" in said and f"kv_cache_dtype={'fp8' if FP8_CACHE else 'auto'}" in said
    assert ("an FP8 KV cache needs a CPU with AVX-512" in said) is not FP8_CACHE
    assert "FP8 on a CPU: weights are expanded" in said
    assert open_model(made.name).config.quantization_config["quant_method"] == "fp8"
    before = (Path(made.name) / "config.json").stat().st_mtime_ns
    convert(Path(source.name), Path(made.name), FP8, "the demo model")
    assert (Path(made.name) / "config.json").stat().st_mtime_ns == before
