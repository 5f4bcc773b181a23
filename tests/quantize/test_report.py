"""The report on the terminal, and progress."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from hunyuan_vllm.quantize.verify import show


def one(projection: str, error: float, output: float | None = None, outliers: dict[int, float] | None = None) -> dict:
    return {
        "projection": projection, "relative_error": error, "input_scale": None,
        "output_error": output, "outliers": outliers or {},
    }  # fmt: skip


MEASURED = [
    one("model.layers.10.self_attn.o_proj", 0.01, 0.02),
    one("model.layers.2.self_attn.o_proj", 0.03, 0.05, {7: 31.5}),
    one("model.layers.2.mlp.gate_proj", 0.02, 0.01),
    one("model.layers.10.mlp.experts.0.up_proj", 0.01, 0.02),
    one("model.layers.10.mlp.experts.1.up_proj", 0.03, 0.04, {1: 11.0, 2: 12.0}),
]


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_table(calibrated: bool) -> None:
    measured = [dict(each, output_error=each["output_error"] if calibrated else None) for each in MEASURED]
    out = io.StringIO()
    show({"scheme": "int8", "projections": measured}, Console(file=out, width=140))
    text = out.getvalue()
    assert text.startswith("int8: relative errors")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    owner = "model.layers.2.self_attn.o_proj"
    if calibrated:
        assert rows[0] == ["attention", "2%", "3.5%", "1", "5%", owner]
        assert rows[2] == ["experts", "2%", "3%", "2", "4%", "model.layers.10.mlp.experts.1.up_proj"]
    else:
        assert rows[0] == ["attention", "2%", "3%", owner]


def test_progress_off_a_terminal_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from hunyuan_vllm.util import progress

    now = iter([0.0, *(10.0 * step for step in range(1, 100))])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    out = io.StringIO()
    shown = progress.Progress(Console(file=out, width=200))
    with shown.stage("quantising", 10 * 10**9, 2 * 10**9):
        for number in range(1, 9):
            shown.advance(10**9, f"{number} of 8 tensors")
    lines = out.getvalue().splitlines()
    assert 1 <= len(lines) <= 4 and all(line.startswith("hunyuan-vllm: quantising: ") for line in lines)
    assert "of 10.0 GB" in lines[0] and "tensors" in lines[0] and lines[0].endswith("left")


def test_progress_on_a_terminal_is_a_bar() -> None:
    from hunyuan_vllm.util.progress import Progress

    out = io.StringIO()
    shown: Any = Progress(Console(file=out, width=160, force_terminal=True))
    with shown.stage("calibrating", 4, 1, unit="layers"):
        shown.advance(1)
    assert "calibrating" in out.getvalue() and "2 of 4 layers" in out.getvalue() and "left" in out.getvalue()
