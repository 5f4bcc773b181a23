"""A run as a PNG: throughput and latencies over the load, a line for each length."""

from __future__ import annotations

import io
from collections import defaultdict
from pathlib import Path

from hunyuan_vllm.bench.result import Measured, Run, write_beside
from hunyuan_vllm.errors import UserError

__all__ = ["need_matplotlib", "save_png"]


def need_matplotlib() -> None:
    """Raises:
    UserError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--png needs matplotlib: pip install 'hunyuan-vllm[plan]'") from None


def save_png(run: Run, path: Path) -> None:
    """Raises:
    UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    lines: dict[str, list[Measured]] = defaultdict(list)
    for one in run.points:
        lines[f"{one.input_len} in, {one.output_len} out"].append(one)
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    speed, first, each = figure.subplots(1, 3)
    for name, points in lines.items():
        at = [_load(one) for one in points]
        speed.plot(at, [one.output_tokens_per_second for one in points], "o-", label=name)
        for axes, times in ((first, [one.ttft for one in points]), (each, [one.tpot for one in points])):
            (line,) = axes.plot(at, [time.p50 for time in times], "o-", label=f"{name}, p50")
            axes.plot(at, [time.p99 for time in times], "^:", color=line.get_color(), label=f"{name}, p99")
    loads = sorted({_load(one) for one in run.points})
    load = "requests a second" if run.points[0].concurrency is None else "requests at a time"
    titles = {speed: "output tokens a second", first: "time to first token, ms", each: "time per output token, ms"}
    for axes, title in titles.items():
        axes.set(xlabel=load, ylabel=title, xscale="log", ylim=(0, None))
        axes.set_xticks(loads, [f"{one:g}" for one in loads], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(f"{run.model}, {run.machine.get('device', 'unknown machine')}, {run.date}")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_beside(path, content.getvalue())


def _load(one: Measured) -> float:
    return one.rate or one.concurrency or 0
