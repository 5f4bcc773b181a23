"""The command: what it prints, and one clear line for each mistake."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hunyuan_vllm import cli, demo
from hunyuan_vllm.quantize.convert import Conversion
from hunyuan_vllm.util.errors import UserError

Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """`hunyuan-vllm quantize …`: exit status, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["hunyuan-vllm", "quantize", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_demo_model_to_fp8(run: Callable, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "Rank the four oceans by area."}]}\n' * 9)
    code, out, err = run(
        "demo", tmp_path / "fp8", "--scheme", "fp8", "--calibration", chats, "--calibration-tokens", 99
    )
    assert (code, out) == (0, "")
    assert "fp8: relative errors" in err
    assert "experts were routed few of the" in err and "holds 3.8 MB, from 6.7 MB; every tensor was read back" in err
    assert f"serve it: MODEL_PATH={tmp_path}/fp8 " in err and err.endswith(" --scheme fp8\n")
    report = json.loads((tmp_path / "fp8" / "quantize_report.json").read_text())
    assert report["calibration"]["text"] == "chats.jsonl" and report["calibration"]["tokens"] <= 99
    assert {"hy.tiktoken", "tokenizer_config.json", "generation_config.json"} < {
        file.name for file in (tmp_path / "fp8").iterdir()
    }


def test_the_plan_writes_nothing(run: Callable, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text((demo.path() / "config.json").read_text())
    code, out, _ = run("hunyuan-large", "--scheme", "int8", "--plan")
    assert code == 0 and "777.4 GB (388.70 billion parameters)" in out
    for source in (tmp_path, config):
        code, out, err = run(source, "--scheme", "fp8", "--plan")
        assert (code, err) == (0, "")
        assert [line.split()[0] for line in out.splitlines()[1:]] == ["reads", "writes", "memory"]
        assert "6.7 MB" in out and "3.8 MB" in out
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SRC", "DST", "--scheme", "int4"], "--scheme int4 is not known here: use one of int8, int8-w8a8, fp8"),
        (["SRC", "--scheme", "int8"], "give DST, the directory to write, after SRC"),
        (["absent", "DST", "--scheme", "int8"], "absent does not exist"),
        (["SRC", "SRC", "--scheme", "int8"], "exists: name a directory that does not"),
        (["SRC", "DST", "--scheme", "fp8", "--calibration", "absent.txt"], "absent.txt cannot be read"),
    ],
)
def test_mistakes_are_one_line(run: Callable, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"SRC": str(demo.path()), "DST": str(tmp_path / "dst")}
    code, out, err = run(*[places.get(argument, argument) for argument in arguments])
    assert code == 2 and out == ""
    assert err.startswith("hunyuan-vllm: ") and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 3, "No space left on device while writing"),
        (KeyboardInterrupt(), 130, "stopped; run the same command again to resume"),
        (UserError("the reason"), 2, "the reason"),
    ],
)
def test_ends_that_are_no_mistake(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(self: Conversion) -> None:
        raise error

    monkeypatch.setattr(Conversion, "run", fail)
    status, _, err = run(demo.path(), tmp_path / "dst", "--scheme", "int8")
    assert status == code and message in err and err.count("\n") == 1


def test_help_teaches() -> None:
    text = CliRunner().invoke(cli.app, ["quantize", "--help"], env={"COLUMNS": "100"}).stdout
    words = ("fp8", "int8-w8a8", "--calibration", "--smooth", "--plan", "Examples:", "DST.partial")
    assert [word for word in words if word not in text] == []
