"""The error report of a conversion: every projection's figures in JSON, and a layer a line on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from hunyuan_vllm.quantize.units import place

__all__ = ["assemble", "kind_of", "show"]

KINDS = ("attention", "shared MLP", "dense MLP", "experts")


def kind_of(projection: str) -> str:
    """Which of `KINDS` a projection belongs to."""
    for mark, kind in ((".self_attn.", "attention"), (".shared_mlp.", "shared MLP"), (".experts.", "experts")):
        if mark in projection:
            return kind
    return "dense MLP"


def assemble(facts: Mapping[str, Any], measured: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The report: `facts` about the run, a summary of each layer, and each projection as `verify.Measured` has it."""
    projections = sorted(measured, key=lambda one: place(one["projection"])[0])
    by_layer: dict[int, list[Mapping[str, Any]]] = {}
    for one in projections:
        by_layer.setdefault(place(one["projection"])[0], []).append(one)
    return {**facts, "layers": [_layer(number, ones) for number, ones in by_layer.items()], "projections": projections}


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print a table with a line a layer."""
    layers = report["layers"]
    with_outputs = layers[0]["output_error"] is not None
    kinds = [kind for kind in KINDS if any(kind in layer["weight_error"] for layer in layers)]
    table = Table(title=f"{report['scheme']}: relative errors, mean of each layer", title_justify="left")
    after = ["outputs", "outlier\nchannels"] if with_outputs else []
    for title in ["layer", *(f"weights,\n{kind}" for kind in kinds), "saturated\nweights", *after]:
        table.add_column(title, justify="right")
    for layer in layers:
        cells = [str(layer["layer"])]
        cells += [_percent(layer["weight_error"][kind]) if kind in layer["weight_error"] else "" for kind in kinds]
        cells.append(_percent(layer["saturated"]))
        if with_outputs:
            cells += [_percent(layer["output_error"]), str(layer["outlier_channels"])]
        table.add_row(*cells)
    console.print(table)
    key = "output_error" if with_outputs else "relative_error"
    worst = max(report["projections"], key=lambda one: one[key])
    console.print(f"largest: {_percent(worst[key])}, {worst['projection']}", highlight=False, soft_wrap=True)


def _layer(number: int, ones: list[Mapping[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "layer": number,
        "weight_error": {
            kind: _mean(one["relative_error"] for one in ones if kind_of(one["projection"]) == kind)
            for kind in KINDS
            if any(kind_of(one["projection"]) == kind for one in ones)
        },
        "saturated": _mean(one["saturated"] for one in ones),
        "output_error": None,
    }
    if ones[0]["output_error"] is not None:
        summary["output_error"] = _mean(one["output_error"] for one in ones)
        summary["outlier_channels"] = sum(len(one["outliers"]) for one in ones)
    return summary


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share else "0"
