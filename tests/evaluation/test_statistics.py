"""Figures of hand-made scores, limits, and rows of the table."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console
from rich.table import Table

from hunyuan_vllm.evaluation.compare import Distance, distance, distance_table
from hunyuan_vllm.evaluation.engines import EngineRun, Variant
from hunyuan_vllm.server.models import demo_model


def test_a_distance() -> None:
    a = {"nll": [math.log(2), math.log(8), math.log(4), math.log(4)]}
    b = {
        "nll": [math.log(4), math.log(8), math.log(8), math.log(16)],
        "kl": [0.5, -1e-9, 0.1, 0.2],
        "same": [0, 1, 1, 1],
    }
    found = distance(a, b, [[3, 4], [1, 7]])
    assert found == Distance(
        tokens=4,
        perplexity_a=pytest.approx(4.0),
        perplexity_b=pytest.approx(2 ** (12 / 4)),
        agreement=0.75,
        kl_mean=pytest.approx(0.2),
        kl_median=pytest.approx(0.15),
        kl_p99=pytest.approx(0.2 + 0.97 * 0.3),
        kl_max=0.5,
        worst=(0, 3),
    )
    assert found.perplexity_ratio == pytest.approx(2.0)


def shown(table: Table) -> list[list[str]]:
    """A table's cells, row by row."""
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table)
    lines = [line.split("│")[1:-1] for line in console.export_text().splitlines() if "│" in line]
    return [[cell.strip() for cell in line] for line in lines]


def test_the_table() -> None:
    found = Distance(100, 2.0, 2.1, 0.9725, 1e-3, 1e-5, 1e-2, 0.5, (0, 1))
    run = EngineRun(Variant.parse("int8:/models/other"), demo_model())
    assert shown(distance_table("bf16", [(run, found)])) == [
        ["int8:other", "2.1000", "1.0500", "97.25%", "1.00e-03", "1.00e-05", "1.00e-02", "5.00e-01"]
    ]
