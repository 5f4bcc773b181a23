"""Two pictures of a plan, as bars on a terminal or as a PNG: rates by batch size, sequences by context."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.plan.plan import Plan

__all__ = ["bars", "save_png"]

WIDTH = 40


def bars(plan: Plan) -> RenderableType:
    """Linear bars; the number beside each says what it stands for."""
    speeds = [(f"batch {rate.decode.batch}", rate.decode.estimate) for rate in plan.rates]
    counts = [(f"{point.length:,} tokens", float(point.shared)) for point in plan.concurrency]
    return Group(
        _chart("\nEstimated tokens a second, decoding", speeds), _chart("\nSequences at once, by length", counts)
    )


def _chart(title: str, rows: Sequence[tuple[str, float]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(width=WIDTH)
    table.add_column(justify="right", no_wrap=True)
    most = max((value for _, value in rows), default=0) or 1
    for name, value in rows:
        table.add_row(name, Bar(most, 0, value, color="cyan"), f"{value:,.0f}")
    return table


def save_png(plan: Plan, path: Path) -> None:
    """Write both curves, on logarithmic axes.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png needs matplotlib: pip install 'hunyuan-vllm[plan]'") from None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    batches = [rate.decode.batch for rate in plan.rates]
    left.plot(batches, [rate.decode.bound for rate in plan.rates], "--", color="gray", label="bound")
    left.plot(batches, [rate.decode.estimate for rate in plan.rates], "o-", label="decoding, estimated")
    left.plot(batches, [rate.served for rate in plan.rates], "s-", label="with prefill, estimated")
    if plan.published:
        published = [rate.batch for rate in plan.published], [rate.rate for rate in plan.published]
        left.plot(*published, "kx", label="published")
    left.set(xscale="log", yscale="log", xlabel="sequences in flight, an engine", ylabel="output tokens a second")
    lengths = [point.length for point in plan.concurrency]
    right.plot(lengths, [point.shared for point in plan.concurrency], "o-", label="with CLA's shared cache")
    right.plot(lengths, [point.unshared for point in plan.concurrency], "s--", label="without")
    right.set(xscale="log", yscale="log", xlabel="tokens a sequence", ylabel="sequences at once, an engine")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    scenario = plan.scenario
    figure.suptitle(f"{scenario.name}, {scenario.scheme.name}, {scenario.gpus} × {scenario.gpu.name}")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(beside, format="png", dpi=120)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"--png {path} cannot be written: {error.strerror}") from None
