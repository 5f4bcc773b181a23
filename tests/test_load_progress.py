"""What a user sees of a load: nothing if it is short, else tensors, bytes and the time left."""

import sys

import pytest
import torch
from checkpoints import random_tensors, tiny_config

from hunyuan_vllm import loader
from hunyuan_vllm.layout import Layout
from hunyuan_vllm.loader import LoadProgress

CONFIG = tiny_config()
TENSORS = len(Layout(CONFIG).expected)


def load(**options: bool) -> int:
    """Load all of a tiny checkpoint, every tensor rounded to int8; returns the number of tensors."""
    progress = LoadProgress(Layout(CONFIG), **options)
    tensors = progress.reading(random_tensors(CONFIG, seed=0))
    return len([*progress.quantised((name, tensor.to(torch.int8)) for name, tensor in tensors)])


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged, as the test goes on."""
    said: list[str] = []
    monkeypatch.setattr(loader.logger, "info", lambda text, *values: said.append(text % values if values else text))
    return said


def test_a_short_load_is_silent(lines: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert load(shown=True) == TENSORS
    assert lines == [] and capfd.readouterr().err == ""


def test_lines_where_there_is_no_terminal(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "QUIET", 0.0)
    monkeypatch.setattr(loader, "LINE_EVERY", 0.0)
    load(shown=True)
    *during, last = lines
    shares = [int(line.removeprefix("Loading weights: ").split("%")[0]) for line in during]
    assert len(during) == TENSORS and shares == sorted(shares) and shares[-1] == 100
    assert f"1 of {TENSORS} tensors, 0.0 GB read, 0.0 GB quantised" in during[0] and during[0].endswith(" left")
    assert last.startswith(f"Loaded {TENSORS} of {TENSORS} tensors, 0.0 GB read, 0.0 GB quantised in 0:")
    lines.clear()
    load(shown=False)
    assert lines == []


def test_a_bar_on_a_terminal(
    lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "QUIET", 0.0)
    monkeypatch.setattr(loader, "LINE_EVERY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    load(shown=True)
    assert f"{TENSORS} of {TENSORS} tensors, 0.0 GB read" in capsys.readouterr().err
    assert len(lines) == 1  # the summary
    load(shown=True, bar=False)
    assert capsys.readouterr().err == "" and len(lines) == TENSORS + 2


def test_bytes_are_counted(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "QUIET", 0.0)
    progress = LoadProgress(Layout(CONFIG), shown=True)
    big = torch.zeros(1).expand(3_000_000_000)  # 12 GB by count, of which 4 bytes are in memory
    list(progress.reading([("model.norm.weight", big)]))
    assert f"1 of {TENSORS} tensors, 12.0 GB read in" in lines[-1]
