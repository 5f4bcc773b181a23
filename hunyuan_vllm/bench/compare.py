"""Two runs beside each other: refused where they are of different machines, and what else differs is said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from hunyuan_vllm.bench.report import load
from hunyuan_vllm.bench.result import Measured, Run
from hunyuan_vllm.errors import UserError

__all__ = ["alone", "check_machines", "comparison", "differences", "pairs"]


def check_machines(a: Run, b: Run, names: tuple[Path, Path]) -> None:
    """Raises:
    UserError: they ran on different machines, or one does not say on which.
    """
    allow = "--other-machine compares them all the same"
    for run, name in zip((a, b), names, strict=True):
        if not run.machine:
            raise UserError(f"{name} does not say on which machine it was measured: {allow}")
    if found := _different(a.machine, b.machine):
        raise UserError(f"they were measured on different machines ({'; '.join(found)}): {allow}")


def differences(a: Run, b: Run) -> list[str]:
    """All that differs but the figures, as "name: A's, B's"."""
    whole = ((a.machine, b.machine), ({"model": a.model}, {"model": b.model}), (a.options, b.options))
    found = [line for one, other in whole for line in _different(one, other)]
    return [*found, *(f"client's {line}" for line in _different(a.client, b.client))]


def _different(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    names = dict.fromkeys([*one, *other])
    return [
        f"{name}: {one.get(name, 'unknown')}, {other.get(name, 'unknown')}"
        for name in names
        if one.get(name) != other.get(name)
    ]


def pairs(a: Run, b: Run) -> list[tuple[Measured, Measured]]:
    """Points of the same load and lengths.

    Raises:
        UserError: there are none.
    """
    known = {one.point.place: one for one in b.points}
    found = [(one, known[one.point.place]) for one in a.points if one.point.place in known]
    if not found:
        raise UserError("they have no point in common: same lengths, and same concurrency or rate")
    return found


def alone(run: Run, other: Run) -> list[Measured]:
    """Points of `run` that `other` has no like of."""
    known = {one.point.place for one in other.points}
    return [one for one in run.points if one.point.place not in known]


def comparison(found: list[tuple[Measured, Measured]]) -> Table:
    """A row a point: A's figure, B's, and B's over A's. Times are medians and 99th percentiles in milliseconds."""
    table = Table(header_style="bold", title="A → B (B/A)", title_justify="left")
    for name in ("in", "out", "load", "out tokens/s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "failed"):
        table.add_column(name, justify="right")
    for one, other in found:
        table.add_row(
            str(one.input_len),
            str(one.output_len),
            load(one),
            _change(one.output_tokens_per_second, other.output_tokens_per_second),
            _change(one.ttft.p50, other.ttft.p50),
            _change(one.ttft.p99, other.ttft.p99),
            _change(one.tpot.p50, other.tpot.p50),
            _change(one.tpot.p99, other.tpot.p99),
            f"{one.failed} → {other.failed}",
        )
    return table


def _change(a: float, b: float) -> str:
    ratio = f"{b / a:.2f}×" if a else "-"
    return f"{a:,.1f} → {b:,.1f} ({ratio})"
