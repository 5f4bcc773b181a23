"""Two runs side by side, with a list of what differs; runs of different machines are refused"""

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from hunyuan_vllm.bench.run import LOAD, METRICS, Run
from hunyuan_vllm.util.errors import UserError


def check_machines(a: Run, b: Run, names: tuple[Path, Path]) -> None:
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


def pairs(a: Run, b: Run) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Points of the same lengths and concurrency."""
    known = {load(point): point for point in b.points}
    found = [(point, known[load(point)]) for point in a.points if load(point) in known]
    if not found:
        raise UserError("the runs have no point with the same lengths and concurrency")
    return found


def load(point: Mapping[str, float]) -> tuple[float, ...]:
    return tuple(point[name] for name in LOAD)


FIGURES = {"out tokens/s": "output_tokens_per_second"} | {
    f"{METRICS[name]} p{of}": f"{name}_p{of}" for name in ("ttft", "tpot") for of in (50, 99)
}


def comparison(found: list[tuple[dict[str, float], dict[str, float]]]) -> Table:
    """A row a point: A's figure, B's, and B's over A's. Times are medians and 99th percentiles in milliseconds."""
    table = Table(header_style="bold", title="A → B (B/A)", title_justify="left")
    for name in ("in", "out", "concurrency", *FIGURES, "failed"):
        table.add_column(name, justify="right")
    for a, b in found:
        failed = f"{a['failed']:g} → {b['failed']:g}"
        table.add_row(
            *(f"{size:g}" for size in load(a)), *(_change(a[name], b[name]) for name in FIGURES.values()), failed
        )
    return table


def _change(a: float, b: float) -> str:
    ratio = f"{b / a:.2f}×" if a else "-"
    return f"{a:,.1f} → {b:,.1f} ({ratio})"
