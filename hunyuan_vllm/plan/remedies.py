"""What to change where a set-up does not fit, cheapest first.

Nothing is offered on faith: each change, or pair of changes, is judged by the same model before it is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations

from hunyuan_vllm.plan.changes import Change, possible_changes, shorter
from hunyuan_vllm.plan.scenario import Scenario
from hunyuan_vllm.plan.verdict import Verdict, judge

__all__ = ["Remedy", "apply_changes", "remedies"]

LENGTH_STEP, LEAST_LENGTH = 1024, 4096
SHORTER_COST = shorter(LEAST_LENGTH).cost


@dataclass(frozen=True)
class Remedy:
    """Some changes and the verdict on what comes out."""

    changes: tuple[Change, ...]
    verdict: Verdict

    @property
    def flags(self) -> str:
        return " ".join(change.flags for change in self.changes)

    @property
    def price(self) -> str:
        return "; ".join(change.price for change in self.changes)

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(change.kind for change in self.changes)


def remedies(verdict: Verdict, any_checkpoint: bool = True, most: int = 6) -> list[Remedy]:
    """Up to `most` ways to make it fit. Where a change suffices, it is not offered together with others."""
    judged = _Judged(verdict.scenario)
    changes = list(possible_changes(verdict.scenario, any_checkpoint))
    pairs = (pair for pair in combinations(changes, 2) if not pair[0].values.keys() & pair[1].values.keys())
    groups: list[tuple[Change, ...]] = list(chain([()], ((change,) for change in changes), pairs))
    candidates = [(_cost(group) + SHORTER_COST * cut, cut, group) for group in groups for cut in (False, True)]
    found: list[Remedy] = []
    for _, cut, group in sorted(candidates, key=lambda candidate: candidate[:2]):
        kinds = {change.kind for change in group} | ({"length"} if cut else set())
        if any(remedy.kinds <= kinds for remedy in found):
            continue
        remedy = judged.shortened(group) if cut else judged.remedy(group)
        if remedy is not None and remedy.verdict.fits:
            found.append(remedy)
            if len(found) == most:
                break
    return found


def apply_changes(scenario: Scenario, changes: Iterable[Change]) -> Scenario:
    for change in changes:
        scenario = scenario.changed(**change.values)
    return scenario


def _cost(group: Sequence[Change]) -> int:
    return sum(change.cost for change in group)


class _Judged:
    """Verdicts on a scenario with changes, each taken once."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.known: dict[str, Remedy] = {}

    def remedy(self, group: tuple[Change, ...]) -> Remedy:
        key = " ".join(change.flags for change in group)
        if key not in self.known:
            self.known[key] = Remedy(group, judge(apply_changes(self.scenario, group)))
        return self.known[key]

    def shortened(self, group: tuple[Change, ...]) -> Remedy | None:
        """With sequences as long as the cache then holds, in whole thousands; None where that is too little."""
        verdict = self.remedy(group).verdict
        scenario, length = verdict.scenario, verdict.shared.tokens // LENGTH_STEP * LENGTH_STEP
        least = max(LEAST_LENGTH, scenario.input_len + scenario.output_len)
        if verdict.problems or not least <= length < scenario.max_model_len:
            return None
        return self.remedy((*group, shorter(length)))
