"""Whether a set-up works and fits, and why not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hunyuan_vllm.plan.checks import problems
from hunyuan_vllm.plan.memory import Budget, Capacity, budgets, capacity
from hunyuan_vllm.plan.scenario import GIB, Scenario

__all__ = ["Verdict", "judge"]


@dataclass(frozen=True)
class Verdict:
    """The judgement of a scenario.

    Attributes:
        problems: why it cannot work at all; memory is then not looked at.
        reasons: why it does not fit.
        budgets: one for each pipeline stage.
        shared, unshared: what the cache holds with CLA's sharing, and what it would without.
    """

    scenario: Scenario
    problems: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    budgets: list[Budget] = field(default_factory=list)
    shared: Capacity = Capacity(0, 1, 0)
    unshared: Capacity = Capacity(0, 1, 0)

    @property
    def fits(self) -> bool:
        return not (self.problems or self.reasons)

    @property
    def tightest(self) -> Budget:
        """The stage with least room for a cache."""
        return min(self.budgets, key=lambda budget: budget.cache)


def judge(scenario: Scenario) -> Verdict:
    """Check, then account."""
    if found := problems(scenario):
        return Verdict(scenario, problems=found)
    rank_budgets = budgets(scenario)
    shared = capacity(scenario, rank_budgets)
    verdict = Verdict(
        scenario, budgets=rank_budgets, shared=shared, unshared=capacity(scenario, rank_budgets, sharing=False)
    )
    return replace(verdict, reasons=_reasons(verdict))


def _reasons(verdict: Verdict) -> list[str]:
    scenario, budget = verdict.scenario, verdict.tightest
    reasons = []
    if not budget.starts:
        most = int(100 * (1 - budget.outside / budget.total)) / 100
        reasons.append(
            f"CUDA and NCCL hold {_gib(budget.outside)} before vLLM takes its share, and --gpu-memory-utilization "
            f"{scenario.utilization} leaves {_gib(budget.total - budget.taken)}: use at most {most}"
        )
    if budget.weights.total > budget.taken:
        reasons.append(f"the weights are {_gib(budget.weights.total)} a GPU, and vLLM may take {_gib(budget.taken)}")
    elif budget.cache <= 0:
        reasons.append(
            f"weights, activations and CUDA graphs are {_gib(budget.taken - budget.cache)} a GPU, and vLLM may take "
            f"{_gib(budget.taken)}: nothing is left for the KV cache"
        )
    elif verdict.shared.tokens < scenario.max_model_len:
        reasons.append(
            f"the KV cache holds {verdict.shared.tokens:,} tokens, and one sequence may have {scenario.max_model_len:,}"
        )
    return reasons


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
