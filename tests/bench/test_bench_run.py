"""Runs beside each other: of one machine, of two, of none that is named; and files that are no runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hunyuan_vllm.bench.run import Run, check_fits, read_run
from hunyuan_vllm.cli import app
from hunyuan_vllm.util.errors import UserError

H20 = {"device": "NVIDIA H20", "devices": "8"}


def measured(speed: float, concurrency: int = 1) -> dict[str, float]:
    times = {f"{name}_p{of}": 10 / speed for name in ("ttft", "tpot", "itl", "e2el") for of in (50, 90, 99)}
    return {
        "concurrency": concurrency, "input_len": 64, "output_len": 16, "requests": 4, "failed": 0, "seconds": 1,
        "requests_per_second": 4, "output_tokens_per_second": 100 * speed, **times,
    }  # fmt: skip


def write(path: Path, *points: dict[str, float], machine: dict[str, str] = H20, **options: str) -> Path:
    run = Run(
        date="2026-01-01T00:00:00+00:00", model="hunyuan", client={"version": "1"}, machine=machine,
        options=options, seed=1, points=list(points),
    )  # fmt: skip
    run.save(path)
    return path


def compare(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", "compare", *map(str, arguments)])
    if isinstance(result.exception, UserError):
        return 2, str(result.exception)
    return result.exit_code, result.stdout


def test_one_machine(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", measured(1), measured(1, 4), vllm="0.32.0")
    b = write(tmp_path / "b.json", measured(2), measured(1, 16), vllm="0.33.0")
    status, text = compare(a, b)
    assert status == 0
    assert "100.0 → 200.0 (2.00×)" in text and "10.0 → 5.0 (0.50×)" in text
    assert "differs: vllm: 0.32.0, 0.33.0" in text
    assert "only in A: 64 in, 16 out, 4 at a time" in text and "only in B: 64 in, 16 out, 16 at a time" in text
    status, text = compare(a, b, "--json")
    document = json.loads(text)
    assert status == 0 and document["differs"] == ["vllm: 0.32.0, 0.33.0"]
    assert [point["b"]["output_tokens_per_second"] for point in document["points"]] == [200]


def test_two_machines_are_compared_only_when_asked(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", measured(1))
    b = write(tmp_path / "b.json", measured(2), machine={**H20, "devices": "16"})
    status, text = compare(a, b)
    assert status == 2 and "devices: 8, 16" in text and "--other-machine" in text
    status, text = compare(a, b, "--other-machine")
    assert status == 0 and "differs: devices: 8, 16" in text
    status, text = compare(a, write(b, measured(1), machine={}))
    assert status == 2 and f"{b} does not say on which machine" in text


def test_nothing_in_common(tmp_path: Path) -> None:
    status, text = compare(write(tmp_path / "a.json", measured(1)), write(tmp_path / "b.json", measured(1, 4)))
    assert status == 2 and "no point with the same lengths" in text


def test_a_file_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.json cannot be read"):
        read_run(tmp_path / "missing.json")
    damaged = write(tmp_path / "a.json", measured(1))
    content = json.loads(damaged.read_text())
    content["points"][0]["failed"] = "some"
    damaged.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"bench --output` \(points\.0\.failed: "):
        read_run(damaged)
    damaged.write_text("[")
    with pytest.raises(UserError, match="bench --output"):
        read_run(damaged)
    with pytest.raises(UserError, match=r"cannot be written"):
        write(tmp_path / "no" / "a.json", measured(1))


@pytest.mark.parametrize("context", [128, 256, 1000])
def test_too_long_a_workload_is_refused_with_lengths_that_fit(context: int) -> None:
    check_fits(2048, 256, None)
    check_fits(2048, 256, 2048 + 256 + 16)
    with pytest.raises(UserError, match="--max-model-len") as refused:
        check_fits(2048, 256, context)
    words = str(refused.value).replace(",", "").split()
    input_len, output_len = (int(words[words.index(name) + 1]) for name in ("--input-len", "--output-len"))
    check_fits(input_len, output_len, context)


@pytest.mark.parametrize("text", ["", "0", "-1", "1,,2", "x", "1.5"])
def test_concurrency_is_a_list_of_whole_numbers(text: str) -> None:
    result = CliRunner().invoke(app, ["bench", f"--concurrency={text}"])
    assert isinstance(result.exception, UserError) and "is not a list of positive" in str(result.exception)
