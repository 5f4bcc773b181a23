"""Runs beside each other, and files that are no runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hunyuan_vllm.bench.run import read_run
from hunyuan_vllm.cli import app
from hunyuan_vllm.util.errors import UserError


def measured(speed: float, concurrency: int = 1) -> dict[str, float]:
    times = {f"{name}_p{of}": 10 / speed for name in ("ttft", "tpot", "itl", "e2el") for of in (50, 90, 99)}
    return {
        "concurrency": concurrency, "input_len": 64, "output_len": 16, "requests": 4, "failed": 0, "seconds": 1,
        "requests_per_second": 4, "output_tokens_per_second": 100 * speed, **times,
    }  # fmt: skip


def write(path: Path, *points: dict[str, float], **server: str) -> Path:
    client = {"version": "1"}
    path.write_text(json.dumps({"model": "hunyuan", "server": server, "client": client, "points": points}))
    return path


def compare(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", "compare", *map(str, arguments)])
    if isinstance(result.exception, UserError):
        return 2, str(result.exception)
    return result.exit_code, result.stdout


def test_what_both_measured_is_compared_and_what_differs_is_listed(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", measured(1), measured(1, 4), device="NVIDIA H20", vllm="0.32.0")
    b = write(tmp_path / "b.json", measured(2), measured(1, 16), device="NVIDIA H200", vllm="0.32.0")
    status, text = compare(a, b)
    assert status == 0
    assert "100.0 → 200.0 (2.00×)" in text and "10.0 → 5.0 (0.50×)" in text and text.count("×)") == 5
    assert "differs: device: NVIDIA H20, NVIDIA H200" in text and "vllm" not in text


def test_nothing_in_common(tmp_path: Path) -> None:
    status, text = compare(write(tmp_path / "a.json", measured(1)), write(tmp_path / "b.json", measured(1, 4)))
    assert status == 2 and "no point with the same lengths" in text


def test_a_file_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.json cannot be read"):
        read_run(tmp_path / "missing.json")
    for text in ("[", "[]", '{"model": "x", "server": {}, "client": {}, "points": [{}]}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match="bench --output"):
            read_run(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["", "0", "-1", "1,,2", "x", "1.5"])
def test_concurrency_is_a_list_of_whole_numbers(text: str) -> None:
    result = CliRunner().invoke(app, ["bench", f"--concurrency={text}"])
    assert isinstance(result.exception, UserError) and "is not a list of positive" in str(result.exception)
