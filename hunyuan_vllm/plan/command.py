"""The command that starts what was planned: variables and flags of `hunyuan-vllm serve`."""

from __future__ import annotations

import shlex

from hunyuan_vllm import demo
from hunyuan_vllm.plan.models import PUBLISHED
from hunyuan_vllm.plan.scenario import Scenario, vllm_limits

__all__ = ["preparation", "serve_command", "serve_flags"]

PLACEHOLDER = "/models/Hunyuan-A52B-Instruct"  # as published; its FP8 checkpoint has "-FP8" behind it


def serve_flags(scenario: Scenario, quantised_checkpoint: bool = False) -> list[str]:
    """vLLM's flags for what differs from its defaults."""
    tokens, sequences = vllm_limits(scenario.gpu)
    given = {
        "--pipeline-parallel-size": (scenario.pipeline, 1),
        "--decode-context-parallel-size": (scenario.dcp, 1),
        "--kv-cache-dtype": (scenario.kv, "auto"),
        "--gpu-memory-utilization": (scenario.utilization, 0.92),
        "--max-num-batched-tokens": (scenario.batched_tokens, tokens),
        "--max-num-seqs": (scenario.sequences, sequences),
    }
    flags = ["--max-model-len", str(scenario.max_model_len)]
    for name, (value, default) in given.items():
        if value != default:
            flags += [name, str(value)]
    flags += ["--enforce-eager"] if scenario.eager else []
    return flags + ([] if quantised_checkpoint else list(scenario.scheme.flags))


def serve_command(scenario: Scenario, quantised_checkpoint: bool = False) -> str:
    """A line to paste into a shell, on the machine with the GPUs or on the head node of their Ray cluster."""
    variables = {"TP_SIZE": str(scenario.tensor)}
    if scenario.name != demo.NAME:  # which is what a server without a path serves
        variables = {"MODEL_PATH": _checkpoint(scenario, quantised_checkpoint)} | variables
    if scenario.nodes > 1:
        variables["LOCAL_IP"] = "10.0.0.5"
    if scenario.needs_partition:
        variables["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, scenario.partition))
    words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return " ".join([*words, "hunyuan-vllm serve", *serve_flags(scenario, quantised_checkpoint)])


def preparation(scenario: Scenario, quantised_checkpoint: bool = False) -> str | None:
    """What must be done before, where the checkpoint is not yet what the scheme loads; None where nothing."""
    if scenario.scheme.name != "fp8" or quantised_checkpoint or scenario.name == PUBLISHED:
        return None
    target = shlex.quote(_checkpoint(scenario, quantised_checkpoint))
    source = shlex.quote(scenario.name)
    return f"fp8 needs an FP8 checkpoint; make it with hunyuan-vllm quantize {source} {target} --scheme fp8-w8a8c8"


def _checkpoint(scenario: Scenario, quantised: bool) -> str:
    name = PLACEHOLDER if scenario.name == PUBLISHED else scenario.name.rstrip("/")
    return name if quantised or scenario.scheme.name != "fp8" else f"{name}-FP8"
