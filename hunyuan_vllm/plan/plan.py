"""Everything there is to say about a scenario, worked out once, for the terminal and for scripts."""

from __future__ import annotations

from dataclasses import dataclass, field

from hunyuan_vllm.plan.checks import notes
from hunyuan_vllm.plan.command import preparation, serve_command
from hunyuan_vllm.plan.curves import Concurrency, Rate, concurrency, rates
from hunyuan_vllm.plan.improvements import Improvement, improvements
from hunyuan_vllm.plan.published import PublishedRate, published_rates
from hunyuan_vllm.plan.rates import Prefill, prefill
from hunyuan_vllm.plan.remedies import Remedy, remedies
from hunyuan_vllm.plan.scenario import Scenario
from hunyuan_vllm.plan.verdict import Verdict, judge

__all__ = ["Plan", "make_plan"]


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
