"""A whole plan: verdict, rates, advice and the command that starts it"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hunyuan_vllm import demo
from hunyuan_vllm.plan.advice import Improvement, Remedy, improvements, remedies
from hunyuan_vllm.plan.model import PUBLISHED, open_planned
from hunyuan_vllm.plan.scenario import Scenario, vllm_limits
from hunyuan_vllm.plan.speed import BATCHES, Decode, Prefill, decode, prefill, served
from hunyuan_vllm.plan.verdict import Verdict, judge, notes

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
    return flags + ([] if quantised_checkpoint else scenario.scheme.flags)


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
    return f"fp8 needs an FP8 checkpoint; make it with hunyuan-vllm quantize {source} {target} --scheme fp8"


def _checkpoint(scenario: Scenario, quantised: bool) -> str:
    name = PLACEHOLDER if scenario.name == PUBLISHED else scenario.name.rstrip("/")
    return name if quantised or scenario.scheme.name != "fp8" else f"{name}-FP8"


@dataclass(frozen=True)
class Rate:
    """Decoding at a batch size, and what a server writes while it also reads the prompts."""

    decode: Decode
    served: float


@dataclass(frozen=True)
class Concurrency:
    """Sequences of so many tokens that one engine's cache holds at once."""

    length: int
    shared: int
    unshared: int


def rates(verdict: Verdict) -> list[Rate]:
    """At powers of two, up to the sequences that may run and whose cache fits."""
    scenario = verdict.scenario
    most = min(scenario.sequences, verdict.shared.sequences(scenario.input_len + scenario.output_len))
    batches = [batch for batch in BATCHES if batch <= most]
    if most > 0 and most not in batches:
        batches.append(most)
    return [Rate(decode(scenario, batch), served(scenario, batch)) for batch in batches]


def concurrency(verdict: Verdict) -> list[Concurrency]:
    """At powers of four from 2048 tokens on, and at the longest sequence."""
    longest = verdict.scenario.max_model_len
    lengths = [length for length in (2048 * 4**power for power in range(10)) if length < longest]
    return [
        Concurrency(length, verdict.shared.sequences(length), verdict.unshared.sequences(length))
        for length in (*lengths, longest)
    ]


DATA = Path(__file__).parent / "data" / "published.json"
SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_experts", "num_attention_heads")


@dataclass(frozen=True)
class PublishedRate:
    """Tokens a second that were published, and the bound of the same set-up."""

    batch: int
    rate: float
    bound: float

    @property
    def share(self) -> float:
        """Part of the bound that was reached."""
        return self.rate / self.bound


def published_rates(scenario: Scenario) -> list[PublishedRate]:
    """For a scenario that is one of the published set-ups (network, scheme, GPUs that share each layer); else none."""
    table: dict[str, Any] = json.loads(DATA.read_text())
    network = open_planned("hunyuan-large").config
    if any(getattr(network, name) != getattr(scenario.config, name) for name in SHAPE):
        return []
    if scenario.gpu.name != table["gpu"] or scenario.input_len != table["input_len"]:
        return []
    return [
        PublishedRate(int(batch), rate, decode(scenario, int(batch)).bound)
        for row in table["rates"]
        if (row["scheme"], row["gpus"], 1) == (scenario.scheme.name, scenario.tensor, scenario.pipeline)
        for batch, rate in row["tokens_per_second"].items()
    ]


@dataclass(frozen=True)
class Plan:
    """A verdict; where it fits, what one gets and what would be better; where not, what to change.

    Attributes:
        command: what starts it.
        remedies: ways to make it fit, cheapest first.
    """

    verdict: Verdict
    notes: list[str] = field(default_factory=list)
    remedies: list[Remedy] = field(default_factory=list)
    improvements: list[Improvement] = field(default_factory=list)
    concurrency: list[Concurrency] = field(default_factory=list)
    rates: list[Rate] = field(default_factory=list)
    published: list[PublishedRate] = field(default_factory=list)
    reading: Prefill | None = None
    command: str = ""

    @property
    def scenario(self) -> Scenario:
        return self.verdict.scenario

    @property
    def prefill(self) -> Prefill:
        """Only of a plan that fits."""
        assert self.reading is not None
        return self.reading


def make_plan(scenario: Scenario, quantised_checkpoint: bool = False) -> Plan:
    """Judge and work out.

    Args:
        quantised_checkpoint: the weights are quantised on disk already, so the scheme is fixed.
    """
    verdict = judge(scenario)
    if not verdict.fits:
        found = notes(scenario) if not verdict.problems else []
        return Plan(verdict, found, remedies(verdict, not quantised_checkpoint))
    return Plan(
        verdict,
        notes(scenario) + [step for step in [preparation(scenario, quantised_checkpoint)] if step],
        improvements=improvements(verdict, not quantised_checkpoint),
        concurrency=concurrency(verdict),
        rates=rates(verdict),
        published=published_rates(scenario),
        reading=prefill(scenario),
        command=serve_command(scenario, quantised_checkpoint),
    )
