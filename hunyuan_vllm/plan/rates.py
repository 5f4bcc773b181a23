"""Tokens a second: decoding by batch size, prefill, and the two together as a server has them."""

from __future__ import annotations

from dataclasses import dataclass

from hunyuan_vllm.plan.roofline import Step, stage_step
from hunyuan_vllm.plan.scenario import Scenario

__all__ = ["BATCHES", "Decode", "Prefill", "decode", "prefill", "served"]

# The least share of the bound that the published rates reached, from a batch on: `tests/plan/test_roofline.py`.
PUBLISHED_SHARES = {1: 0.032, 4: 0.065}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Decode:
    """Decoding with so many sequences in flight on all engines together.

    Attributes:
        batch: sequences of one engine.
        step: the slowest stage's step; of `batch` sequences divided among the stages.
        bound, estimate: tokens a second, of all engines; the estimate was not validated on GPUs.
        per_sequence: tokens a second that one user sees, estimated.
    """

    batch: int
    step: Step
    bound: float
    estimate: float
    per_sequence: float

    @property
    def low(self) -> float:
        """The low end of what to expect: the share of the bound that the only published rates reached."""
        share = max(share for batch, share in PUBLISHED_SHARES.items() if batch <= self.batch)
        return min(self.estimate, share * self.bound)


@dataclass(frozen=True)
class Prefill:
    """Reading one prompt.

    Attributes:
        step: one rank's work on it, of the slowest stage.
        bound, estimate: tokens a second, of all engines.
        first_token: seconds to the first token of an idle server, estimated.
    """

    step: Step
    bound: float
    estimate: float
    first_token: float


def decode(scenario: Scenario, batch: int) -> Decode:
    """Rates at `batch` sequences an engine, each with the input and half of the output behind it.

    With pipeline stages vLLM keeps as many groups of sequences in flight as there are stages, so that each works; a
    token takes a round of all stages, and in a round every sequence gets one.
    """
    context = scenario.input_len + scenario.output_len / 2
    group = -(-batch // scenario.pipeline)
    steps = [stage_step(scenario, stage, group, context) for stage in scenario.stages]
    slowest = max(steps, key=lambda step: step.estimate)
    estimate = batch / _round(scenario, batch, [step.estimate for step in steps])
    bound = batch / _round(scenario, batch, [step.bound for step in steps])
    return Decode(batch, slowest, scenario.replicas * bound, scenario.replicas * estimate, estimate / batch)


def _round(scenario: Scenario, batch: int, seconds: list[float]) -> float:
    """Seconds until every sequence has a token: all stages in turn, or the slowest as often as there are groups."""
    groups = min(batch, scenario.pipeline)
    return max(sum(seconds), groups * max(seconds))


def prefill(scenario: Scenario, length: int | None = None) -> Prefill:
    """Rates of reading prompts of `length` tokens (default: the scenario's), one after the other.

    A prompt longer than a step's tokens goes in pieces; attention's work is that of its mean context.
    """
    length = length or scenario.input_len
    tokens = min(length, scenario.batched_tokens)
    pieces = length / tokens
    steps = [stage_step(scenario, stage, tokens, length / 2, sequences=1) for stage in scenario.stages]
    slowest = max(steps, key=lambda step: step.estimate)
    bound = tokens / max(step.bound for step in steps)
    first = sum(step.estimate for step in steps) + (pieces - 1) * slowest.estimate
    return Prefill(slowest, scenario.replicas * bound, scenario.replicas * tokens / slowest.estimate, first)


def served(scenario: Scenario, batch: int) -> float:
    """Output tokens a second, of all engines, while every finished request is replaced by a new one: each of `batch`
    sequences costs its prefill and its steps, one after the other."""
    read = batch * scenario.input_len * scenario.replicas / prefill(scenario).estimate
    written = batch * scenario.output_len * scenario.replicas / decode(scenario, batch).estimate
    return scenario.replicas * batch * scenario.output_len / (read + written)
