"""Two runs side by side, with a list of what differs; runs of different machines are refused"""

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from hunyuan_vllm.bench.run import Point, Run
from hunyuan_vllm.util.errors import UserError


def check_machines(a: Run, b: Run, names: tuple[Path, Path]) -> None:
    """Refuse runs of different machines.

    Raises:
        UserError: the machines differ, or one is unknown.
    """
    remedy = "--other-machine compares them anyway"
    for run, name in zip((a, b), names, strict=True):
        if not run.machine:
            raise UserError(f"{name} does not say on which machine it was measured: {remedy}")
    if found := _different(a.machine, b.machine):
        raise UserError(f"they were measured on different machines ({'; '.join(found)}): {remedy}")


def differences(a: Run, b: Run) -> list[str]:
    """Everything that differs except the figures, as "name: A's, B's"."""
    parts = ((a.machine, b.machine), ({"model": a.model}, {"model": b.model}), (a.options, b.options))
    found = [line for one, other in parts for line in _different(one, other)]
    return [*found, *(f"client's {line}" for line in _different(a.client, b.client))]


def _different(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [
        f"{name}: {one.get(name, 'unknown')}, {other.get(name, 'unknown')}"
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    ]


def pairs(a: Run, b: Run) -> list[tuple[Point, Point]]:
    """Points of the same lengths and concurrency.

    Raises:
        UserError: there are none.
    """
    known = {point.load: point for point in b.points}
    found = [(point, known[point.load]) for point in a.points if point.load in known]
    if not found:
        raise UserError("the runs have no point with the same lengths and concurrency")
    return found


def comparison(found: list[tuple[Point, Point]]) -> Table:
    """A row a point: A's figure, B's, and B's over A's. Times are medians and 99th percentiles in milliseconds."""
    table = Table(header_style="bold", title="A → B (B/A)", title_justify="left")
    for name in ("in", "out", "concurrency", "out tokens/s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "failed"):
        table.add_column(name, justify="right")
    for one, other in found:
        table.add_row(
            *map(str, one.load),
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
