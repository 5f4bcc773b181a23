"""What deploy/*.sh would start on the published topology, two nodes of eight H20s, read by vLLM's own parser."""

import shlex
from argparse import Namespace
from functools import cache
from pathlib import Path

import pytest
from fake_h20s import FakeHead, write_published
from vllm.utils.argparse_utils import FlexibleArgumentParser

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:  # vLLM 0.33
    from vllm.entrypoints.common.cli_args import make_arg_parser

NODES = ("10.0.0.5", "10.0.0.6")
SCRIPTS = {"run_server.sh": "bf16", "run_server_int8.sh": "bf16", "run_server_fp8.sh": "fp8"}


@cache
def vllm_parser() -> FlexibleArgumentParser:
    return make_arg_parser(FlexibleArgumentParser())


def parsed(shown: str) -> tuple[dict[str, str], Namespace]:
    """Variables and vLLM's arguments of the command that was shown."""
    words = shlex.split(shown.replace("\\\n", " "))
    assert words[0] == "env"
    serve = words.index("serve")
    python = words.index("-P") - 1
    return dict(word.split("=", 1) for word in words[1:python]), vllm_parser().parse_args(words[serve + 1 :])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("models")
    return {
        "bf16": str(write_published(directory / "Hunyuan-A52B-Instruct")),
        "fp8": str(write_published(directory / "Hunyuan-A52B-Instruct-FP8", fp8=True)),
    }


@pytest.fixture(scope="module")
def shown(tmp_path_factory, checkpoints) -> dict[str, str]:
    """Script → what it prints with --dry-run on the head, as it would read with the checkpoints in /models."""
    head = FakeHead(tmp_path_factory.mktemp("head"), NODES)
    models = str(Path(checkpoints["bf16"]).parent)
    outputs = {}
    for script, checkpoint in SCRIPTS.items():
        done = head.dry_run(script, MODEL_PATH=checkpoints[checkpoint])
        assert done.returncode == 0, done.stderr
        outputs[script] = done.stdout.replace(models, "/models")
    return outputs


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "run_server.sh",
            {"tensor_parallel_size": 16, "decode_context_parallel_size": 2, "distributed_executor_backend": "ray"},
        ),
        (
            "run_server_int8.sh",
            {"tensor_parallel_size": 8, "decode_context_parallel_size": 1, "distributed_executor_backend": None,
             "quantization": "hunyuan_int8"},
        ),
        (
            "run_server_fp8.sh",
            {"tensor_parallel_size": 8, "decode_context_parallel_size": 1, "distributed_executor_backend": None,
             "kv_cache_dtype": "fp8"},
        ),
    ],
)  # fmt: skip
def test_each_script(shown, script, expected):
    variables, arguments = parsed(shown[script])
    assert {name: getattr(arguments, name) for name in expected} == expected
    several_nodes = arguments.distributed_executor_backend == "ray"
    assert variables.get("NCCL_SOCKET_IFNAME") == (None if several_nodes else "lo")


def test_a_node_that_has_not_joined_is_counted_on(tmp_path, checkpoints):
    """The weights do not fit on one node, so the server waits for the other rather than run out of memory."""
    done = FakeHead(tmp_path, NODES[:1]).dry_run("run_server.sh", MODEL_PATH=checkpoints["bf16"])
    arguments = parsed(done.stdout)[1]
    assert (arguments.tensor_parallel_size, arguments.distributed_executor_backend) == (16, "ray")
    assert "waits for 16 GPUs in Ray: 10.0.0.5 has 8 of its 8 GPUs free" in done.stderr
