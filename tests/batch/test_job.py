"""A whole run as far as it goes without an engine: what is refused before any work, and when there is none left."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from chat_templates import FAULTY
from rich.console import Console

from hunyuan_vllm import demo
from hunyuan_vllm.batch import job as job_module
from hunyuan_vllm.batch.engine import engine_options, parse_options
from hunyuan_vllm.batch.job import FAILED_LINES, run_batch
from hunyuan_vllm.batch.output import Output, Record, Settings, failed
from hunyuan_vllm.batch.requests import BadLine
from hunyuan_vllm.batch.runner import Reporter
from hunyuan_vllm.server.middleware.errors import Problem
from hunyuan_vllm.server.models import demo_model, open_model
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.jsonl import read_lines
from hunyuan_vllm.util.progress import LINE_EVERY, Progress


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [{"prompt": "a"}, {"prompt": "b", "top_p": 2}, {"messages": [], "temprature": 1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def job(source, target, **options) -> Callable[[Console], int]:
    return partial(run_batch, source, target, demo_model(), **options)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """A run sets variables for its engine, in a process of its own otherwise."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_files_are_looked_at_first(tmp_path, source):
    for wrong, says in [
        (job(tmp_path / "none", tmp_path / "out"), "none does not exist"),
        (job(tmp_path, tmp_path / "out"), "is not a regular file"),
        (job(source, tmp_path), "is not a regular file"),
        (job(source, tmp_path / "none" / "out"), "none does not exist: create it"),
        (job(source, source), "both input and output"),
    ]:
        with pytest.raises(UserError, match=says):
            wrong(console())
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gzip.compress(b"{}", mtime=0), "is compressed with gzip: write it as JSONL first, with gunzip -k "),
        ('{"prompt": "a"}'.encode("utf-16"), "is UTF-16: convert it to UTF-8 first"),
        ('{"prompt": "汉"}'.encode("gb18030"), "has no line of JSON; line 1: 'utf-8' codec can't decode"),
        (b'[\n {"prompt": "a",\n', r"has no line of JSON; line 1: .* one JSON array: write one object per line"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_jsonl_starts_nothing(tmp_path, content, says):
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    with pytest.raises(UserError, match=says):
        job(source, tmp_path / "out")(console())
    assert not (tmp_path / "out").exists()


def test_a_template_that_is_replaced_is_noted(tmp_path, monkeypatch):
    checkpoint = shutil.copytree(demo.path(), tmp_path / "model")
    model = open_model(str(checkpoint))
    plain = engine_options(model, [], os.environ).notes
    (checkpoint / "chat_template.jinja").write_text(FAULTY)
    (note,) = [note for note in engine_options(model, [], os.environ).notes if note not in plain]
    assert "ends with <|extra_4|>" in note and "HUNYUAN_VLLM_CHECKPOINT_CHAT_TEMPLATE=1" in note
    assert engine_options(model, ["--chat-template", "x.jinja"], os.environ).notes == plain
    monkeypatch.setenv("HUNYUAN_VLLM_CHECKPOINT_CHAT_TEMPLATE", "1")
    assert engine_options(model, [], os.environ).notes == plain


def test_a_default_that_no_line_can_have(tmp_path, source):
    with pytest.raises(UserError, match="as a default for all lines, temperature must be"):
        job(source, tmp_path / "out", defaults={"temperature": -1})(console())
    with pytest.raises(UserError, match="as a default for all lines, seed"):
        job(source, tmp_path / "out", defaults={"seed": "x"})(console())


@pytest.mark.parametrize(("flags", "says"), [(["--bogus", "1"], "--bogus 1"), (["--dtype", "x"], "--dtype.*'x'")])
def test_a_flag_that_vllm_does_not_know(flags, says):
    with pytest.raises(UserError, match=f"{says}.*vllm serve --help=all"):
        parse_options(["model", *flags])


def test_options_are_those_of_the_server():
    made = engine_options(
        demo_model(), ["--max-model-len", "64"], {"HOST": "0.0.0.0", "VLLM_API_KEY": "k", "TP_SIZE": "2"}
    )
    args = parse_options(made.argv)
    assert (args.model, args.max_model_len, args.tensor_parallel_size) == (demo_model().name, 64, 2)
    assert args.kv_cache_memory_bytes == 256 * 2**20
    assert made.env["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--enforce-eager", "in.jsonl", "out.jsonl"], "IN.jsonl and OUT.jsonl come first"),
        (["in.jsonl", "out.jsonl", "--params", "[1]"], "--params [1] is not a JSON object"),
        (["in.jsonl", "out.jsonl", "--model", "/none/such"], "/none/such does not exist"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments, says, tmp_path):
    command = [Path(sys.executable).with_name("hunyuan-vllm"), "batch", *arguments]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert says in ran.stderr and ran.stderr.count("\n") == 1


def test_nothing_is_left_to_do(tmp_path, source, monkeypatch):
    first, second, third = read_lines(source)
    settings = Settings(demo_model().given)
    error = failed(second, settings, BadLine(Problem("top_p", "top_p: no")))
    answers = [Record(failed(line, settings, BadLine(Problem(None, ""))).text, False) for line in (first, third)]
    output = Output(tmp_path / "out")
    output.append([*answers, error])
    output.close()
    screen = console()
    monkeypatch.setattr(job_module, "generate", None)  # no engine
    assert job(source, tmp_path / "out")(screen) == FAILED_LINES
    assert "0 of 3 lines answered, 3 failed" in said(screen)
    assert "--retry-failed" in said(screen)


def test_progress_away_from_a_terminal(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    screen = console()
    reporter = Reporter(total=1000, left=900, failed=1, progress=Progress(screen))
    with reporter.writing():
        now += LINE_EVERY - 1
        reporter.advance([Record(b"", number < 2, 50) for number in range(99)])
        assert said(screen) == ""
        now += 1
        reporter.advance([Record(b"", False, 50)])
    assert said(screen) == "hunyuan-vllm: answered: 200 of 1,000 lines, 3 failed, 167 tokens/s, 4:00 left\n"
    assert (
        reporter.summary()
        == "197 of 1000 lines answered, 3 failed; 100 in this run: 5,000 tokens in 0:30, 167 tokens/s"
    )
