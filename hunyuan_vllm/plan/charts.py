"""Two pictures of a plan, as bars on a terminal or as a PNG: rates by batch size, sequences by context."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Group, RenderableType

from hunyuan_vllm.bar_chart import bar_chart
from hunyuan_vllm.errors import UserError
from hunyuan_vllm.plan.plan import Plan

__all__ = ["bars", "save_png"]


def bars(plan: Plan) -> RenderableType:
    """Linear bars; the number beside each says what it stands for."""
    speeds = [(f"batch {rate.decode.batch}", rate.decode.estimate) for rate in plan.rates]
    counts = [(f"{point.length:,} tokens", float(point.shared)) for point in plan.concurrency]
    return Group(
        bar_chart("\nEstimated tokens a second, decoding", speeds), bar_chart("\nSequences at once, by length", counts)
    )


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
