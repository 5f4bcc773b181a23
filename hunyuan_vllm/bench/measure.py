"""All points of a run, one after the other, kept after each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hunyuan_vllm.bench.load import run_point, warm_up
from hunyuan_vllm.bench.result import Run
from hunyuan_vllm.bench.target import Target
from hunyuan_vllm.bench.workload import Point

__all__ = ["measure"]


def measure(
    run: Run, target: Target, wanted: Sequence[Point], warm: bool, output: Path | None, notes: Console
) -> str | None:
    """Measure `wanted` into `run.points`, and into `output` as each is done. An error of a request that failed, if any.

    Raises:
        UserError: `output` cannot be written.
    """
    error = None
    for number, point in enumerate(wanted):
        place = f"{number + 1} of {len(wanted)}: {point}"
        if warm:
            notes.print(f"{place}: warming up", style="dim")
            warm_up(target, point, number, run.seed)
        notes.print(f"{place}: {point.requests} requests", style="dim")
        measured, problem = run_point(target, point, number, run.seed)
        error = error or problem
        run.points.append(measured)
        if output:
            run.save(output)
    return error
