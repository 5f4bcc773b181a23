"""The two curves of a plan: batch size against tokens a second, and context against sequences at once."""

from __future__ import annotations

from dataclasses import dataclass

from hunyuan_vllm.plan.rates import BATCHES, Decode, decode, served
from hunyuan_vllm.plan.verdict import Verdict

__all__ = ["Concurrency", "Rate", "concurrency", "rates"]


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
