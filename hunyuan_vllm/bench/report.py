"""A run on a terminal: a table, bars, and the published rates beside."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from hunyuan_vllm.bar_chart import bar_chart
from hunyuan_vllm.bench.result import Measured, Run, Times

__all__ = ["bars", "described", "published_table", "run_table"]


def described(run: Run) -> str:
    """What was measured, in two lines."""
    machine = ", ".join(value if name == "device" else f"{name} {value}" for name, value in run.machine.items())
    options = ", ".join(f"{name} {value}" for name, value in run.options.items())
    return f"{run.model} on {machine or 'a machine that the server does not name'}\n{options}"


def run_table(run: Run) -> Table:
    """A row a point; times are milliseconds, p50 / p90 / p99."""
    table = Table(title_justify="left", header_style="bold")
    for name in ("in", "out", "load", "requests", "failed", "requests/s", "out tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("TTFT", "TPOT", "ITL", "E2E"):
        table.add_column(f"{name}, ms", justify="right")
    for one in run.points:
        table.add_row(
            str(one.input_len),
            str(one.output_len),
            load(one),
            str(one.requests),
            f"[red]{one.failed}[/]" if one.failed else "0",
            f"{one.requests_per_second:.3g}",
            f"{one.output_tokens_per_second:,.1f}",
            *(_three(times) for times in (one.ttft, one.tpot, one.itl, one.e2e)),
        )
    return table


def load(one: Measured) -> str:
    return f"{one.rate:g}/s" if one.concurrency is None else f"{one.concurrency} at a time"


def _three(times: Times) -> str:
    values = (times.p50, times.p90, times.p99)
    return " / ".join(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)


def bars(run: Run) -> RenderableType:
    """Throughput, and the median time to the first token."""
    names = [str(one.point) for one in run.points]
    speeds = [one.output_tokens_per_second for one in run.points]
    waits = [one.ttft.p50 for one in run.points]
    return Group(
        bar_chart("\nOutput tokens a second", list(zip(names, speeds, strict=True)), digits=1),
        bar_chart("\nTime to the first token, median, ms", list(zip(names, waits, strict=True)), digits=1),
    )


def published_table(points: Sequence[Measured]) -> Table:
    """The published rates of Hunyuan-Large, and this run's of the same batch and input.

    They are context: of other machines, and without word of the output's length or of whether prefill counted.
    """
    from hunyuan_vllm.plan.published import DATA

    published = json.loads(DATA.read_text())
    same = [one for one in points if one.input_len == published["input_len"] and one.concurrency in (1, 4)]
    table = Table(title=f"Published, {published['input_len']} tokens in: tokens/s", title_justify="left")
    for name in ("scheme", "GPUs", "batch 1", "batch 4"):
        table.add_column(name, justify="right")
    for row in published["rates"]:
        rates = row["tokens_per_second"]
        table.add_row(row["scheme"], f"{row['gpus']} × {published['gpu']}", str(rates["1"]), str(rates["4"]))
    ours = {str(one.concurrency): f"{one.output_tokens_per_second:.1f}" for one in same}
    table.add_row("this run", "", ours.get("1", "-"), ours.get("4", "-"))
    return table
