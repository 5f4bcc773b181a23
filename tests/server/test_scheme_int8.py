"""Serving in int8: options, GPUs and memory, from a BF16 checkpoint or an int8 one; and the demo model, asked."""

import os
import subprocess
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from launches import CPU, DEMO, GIB, GPU8, HUB, LARGE, MODEL, NODE1, parsed
from serving import running_server

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.envs import Settings
from hunyuan_vllm.layout import expected_tensors
from hunyuan_vllm.quant.formats import PACKED, PLAIN
from hunyuan_vllm.quant.quantization_config import describe, stored_format
from hunyuan_vllm.quant.schemes import INT8, INT8_W8A8, Scheme
from hunyuan_vllm.server.hardware import Machine
from hunyuan_vllm.server.launch import Launch, decide
from hunyuan_vllm.server.models import ModelSource
from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.util.errors import UserError

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
LAYER = HunYuanConfig(**LARGE.to_diff_dict() | {"num_hidden_layers": 1})
TENSORS = expected_tensors(LAYER)
ONE_LAYER = replace(MODEL, config=LAYER, weight_bytes=2 * sum(map(prod, TENSORS.values())))


def described(fields: dict) -> ModelSource:
    config = HunYuanConfig(**LARGE.to_diff_dict() | {"quantization_config": fields})
    return replace(MODEL, config=config, format=stored_format(fields))


def launch(scheme: Scheme | None, machine: Machine, model: ModelSource, *flags: str, **environ: str) -> Launch:
    return decide(Settings.read(environ), Flags(flags), machine, model, environ, scheme=scheme)


@pytest.mark.parametrize(
    ("scheme", "machine", "model", "flags", "environ", "expected"),
    [
        (INT8, GPU8, MODEL, [], {}, {"tensor_parallel_size": 8, "quantization": "hunyuan_int8"}),
        (INT8_W8A8, GPU8, MODEL, [], {}, {"quantization": "hunyuan_int8_w8a8", "kv_cache_dtype": "auto"}),
        (INT8, NODE1, MODEL, [], {}, {"tensor_parallel_size": 8, "distributed_executor_backend": None}),
        (INT8, NODE1, MODEL, [], {"TP_SIZE": "16"}, {"tensor_parallel_size": 16}),
        (INT8, NODE1, HUB, [], {}, {"tensor_parallel_size": 8, "quantization": "hunyuan_int8"}),
        (INT8, GPU8, described(describe(PACKED)), [], {}, {"quantization": "hunyuan_int8"}),
        (INT8, GPU8, described(describe(PLAIN)), [], {}, {"quantization": "hunyuan_int8"}),
        (INT8, GPU8, MODEL, ["-q", "experts_int8"], {}, {"quantization": "experts_int8"}),
        (INT8, CPU, DEMO, [], {}, {"tensor_parallel_size": 1, "quantization": "hunyuan_int8"}),
    ],
)
def test_decision(
    scheme: Scheme, machine: Machine, model: ModelSource, flags: list, environ: dict, expected: dict
) -> None:
    arguments = vars(parsed(launch(scheme, machine, model, *flags, **environ)))
    assert {name: arguments[name] for name in expected} == expected


@pytest.mark.parametrize("scheme", [None, INT8])
def test_memory_for_the_cache_is_counted_from_quantised_weights(scheme: Scheme | None) -> None:
    quantised = sum(prod(shape) for name, shape in TENSORS.items() if name.endswith("_proj.weight"))
    assert quantised > 0.7 * ONE_LAYER.weight_bytes / 2
    machine = replace(CPU, memory=ONE_LAYER.weight_bytes + 6 * GIB)
    arguments = parsed(launch(scheme, machine, ONE_LAYER))
    free = 4 * GIB + (quantised if scheme else 0)
    assert arguments.kv_cache_memory_bytes == min(free // 2, 4 * GIB) // 2**20 * 2**20
    by_flag = parsed(launch(None, machine, ONE_LAYER, *(["-q", "hunyuan_int8"] if scheme else [])))
    assert by_flag.kv_cache_memory_bytes == arguments.kv_cache_memory_bytes


def test_checkpoints_quantised_otherwise() -> None:
    with pytest.raises(UserError, match=r"is FP8 .*, and --scheme int8 serves an unquantised checkpoint, or"):
        launch(INT8, GPU8, described({"quant_method": "fp8", "activation_scheme": "static"}))


@pytest.mark.server
def test_the_demo_model_answers() -> None:
    with running_server("--scheme", "int8") as server:
        asked = subprocess.run(
            ["sh", ROOT / "deploy" / "openapi.sh", "--raw"], capture_output=True, text=True, timeout=120,
            env={**os.environ, "PORT": str(server.port)},
        )  # fmt: skip
        assert asked.returncode == 0 and '"finish_reason":"stop"' in asked.stdout, asked.stderr
        assert "quantization=hunyuan_int8" in server.said
