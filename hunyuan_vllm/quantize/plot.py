"""The error report as a picture: what each layer's weights and outputs lose, and where the outliers are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hunyuan_vllm.quantize.report import KINDS, kind_of
from hunyuan_vllm.quantize.units import place

__all__ = ["can_draw", "draw"]

COLOURS = dict(zip(KINDS, ("#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e"), strict=True))


def can_draw() -> bool:
    """Whether matplotlib, which the extra `quantize` brings, is there."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def draw(report: Mapping[str, Any], file: Path) -> None:
    """Write a PNG: a dot a projection, by layer."""
    from matplotlib.figure import Figure

    panels = [("relative_error", "weights: ‖Ŵ − W‖ / ‖W‖, %")]
    if report["projections"][0]["output_error"] is not None:
        panels.append(("output_error", "outputs: ‖ŷ − y‖ / ‖y‖, %"))
        panels.append(("outliers", "largest input channel / median (from 10)"))
    panels.append(("saturated", "saturated weights, %"))
    figure = Figure(figsize=(max(7, 0.16 * len(report["layers"]) + 4), 2.4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (key, label) in zip(axes, panels, strict=True):
        for kind in KINDS:
            points = [(place(one["projection"])[0], _value(one[key])) for one in report["projections"]
                      if kind_of(one["projection"]) == kind]  # fmt: skip
            shown = [(layer, value) for layer, value in points if value is not None]
            if points:
                beside = 0.1 * KINDS.index(kind)  # dots of another kind stay visible
                x, y = [layer + beside for layer, _ in shown], [value for _, value in shown]
                axis.scatter(x, y, s=10, alpha=0.6, color=COLOURS[kind], label=kind)
        if key != "outliers":
            axis.set_ylim(0, 1.1 * axis.dataLim.y1 or 1)
        elif any(one["outliers"] for one in report["projections"]):
            axis.set_yscale("log")
        else:
            axis.set_yticks([])
            axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center")
        axis.set_title(label, loc="left", fontsize=9)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=len(KINDS))
    axes[-1].set_xlabel("layer")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{report['scheme']} of {report['source']}", fontsize=10)
    figure.savefig(file, format="png", dpi=110)


def _value(given: float | Mapping[int, float]) -> float | None:
    """A share in per cent, or the greatest of some outliers."""
    if isinstance(given, Mapping):
        return max(given.values(), default=None)
    return 100 * given
