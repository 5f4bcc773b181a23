"""What an evaluation found, as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from hunyuan_vllm.evaluation.compare import Compared
from hunyuan_vllm.evaluation.statistics import Distance

__all__ = ["Limits", "distance_table", "distances_json", "percent"]


@dataclass(frozen=True)
class Limits:
    """What a contestant must keep to; None asks for nothing."""

    agreement: float | None = None
    kl: float | None = None
    perplexity_ratio: float | None = None

    def broken(self, name: str, found: Distance) -> list[str]:
        """The limits that `found` breaks, each in words."""
        problems = []
        if self.agreement is not None and found.agreement < self.agreement:
            problems.append(f"top-1 agreement {percent(found.agreement)} is below {percent(self.agreement)}")
        if self.kl is not None and found.kl_mean > self.kl:
            problems.append(f"mean KL {found.kl_mean:.2e} is above {self.kl:.2e}")
        if self.perplexity_ratio is not None and found.perplexity_ratio > self.perplexity_ratio:
            problems.append(f"perplexity ratio {found.perplexity_ratio:.4f} is above {self.perplexity_ratio:.4f}")
        return [f"{name}: {problem}" for problem in problems]


def distance_table(a: str, compared: Sequence[Compared]) -> Table:
    """One row a contestant, with what it is measured against in the title."""
    first = compared[0].distance
    table = Table(
        title=f"against {a}, whose perplexity is {first.perplexity_a:.4f}; {first.tokens:,} tokens",
        title_justify="left",
    )
    table.add_column("")
    for name in ("perplexity", "ratio", "top-1 agreement", "KL mean", "median", "p99", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in compared:
        found = one.distance
        tail = (found.kl_mean, found.kl_median, found.kl_p99, found.kl_max)
        table.add_row(
            one.contestant.scheme.label,
            f"{found.perplexity_b:.4f}",
            f"{found.perplexity_ratio:.4f}",
            percent(found.agreement),
            *(f"{value:.2e}" for value in tail),
        )
    return table


def distances_json(model: str, a: str, compared: Sequence[Compared]) -> dict[str, Any]:
    """The same, with every figure in full."""
    return {
        "model": model,
        "a": a,
        "compared": [
            {
                "b": one.contestant.scheme.label,
                "checkpoint": one.contestant.model.given,
                **asdict(one.distance),
                "perplexity_ratio": one.distance.perplexity_ratio,
            }
            for one in compared
        ],
    }


def percent(share: float) -> str:
    """As in 98.25%."""
    return f"{100 * share:.2f}%"
