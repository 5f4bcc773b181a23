"""Killed at any moment, it goes on; and what it must not touch it does not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_config, write_checkpoint

from hunyuan_vllm.quantize.convert import quantize_checkpoint
from hunyuan_vllm.quantize.writer import ShardWriter, Workspace
from hunyuan_vllm.util.errors import UserError

pytestmark = pytest.mark.slow

Documents = list[list[int]]


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def in_a_child(work: Callable[[], object]) -> int:
    """Run in a forked process; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def kill_before_rename(count: int) -> None:
    """End this process with SIGKILL just before its `count`th rename."""
    real, seen = os.replace, 0

    def replace(*names: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*names)

    os.replace = replace


def test_kill_9_before_every_rename(tmp_path: Path, documents: Documents) -> None:
    """Everything becomes real by a rename: what a run can find after a kill is what lies between two of them."""
    source = write_checkpoint(tmp_path / "src", tiny_config(num_hidden_layers=2))

    def run(target: Path) -> None:
        options = dict(calibration=documents[:1], smooth=0.5, shard_bytes=250_000)
        quantize_checkpoint(source, target, "fp8", **options)

    def killed_run(target: Path, count: int) -> None:
        kill_before_rename(count)
        run(target)

    run(tmp_path / "whole")
    wanted = digests(tmp_path / "whole")
    for count in range(1, 100):
        target = tmp_path / str(count)
        end = in_a_child(lambda target=target, count=count: killed_run(target, count))
        if end == 0:
            break
        assert end == -signal.SIGKILL and not target.exists()
        run(target)
        assert digests(target) == wanted
        shutil.rmtree(target)
    assert count > 12  # options, two layers, their activations, files and their reports, index, config, report, DST


def test_kill_9_within_a_file(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, target = tmp_path / "whole", tmp_path / "killed"
    quantize_checkpoint(tiny, whole, "int8", shard_bytes=200_000)

    def killed() -> None:
        writes = ShardWriter.write
        left = iter(range(150, -1, -1))

        def write(*given: Any) -> None:
            writes(*given)
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        ShardWriter.write = write
        quantize_checkpoint(tiny, target, "int8", shard_bytes=200_000)

    assert in_a_child(killed) == -signal.SIGKILL
    checkpoint = tmp_path / "killed.partial" / "checkpoint"
    finished = {file.name: file.stat().st_mtime_ns for file in checkpoint.glob("model-*")}
    assert finished and list(checkpoint.glob(".model-*.partial"))
    quantize_checkpoint(tiny, target, "int8", shard_bytes=200_000)
    assert digests(target) == digests(whole)
    # What was finished was not made again.
    assert all((target / name).stat().st_mtime_ns == time for name, time in finished.items())


@pytest.fixture
def unfinished(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target that a run was interrupted before finishing."""
    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(tiny, tmp_path / "dst", "int8")
    return tmp_path / "dst"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scheme="int8-w8a8"), "started with --scheme int8, this run has int8-w8a8"),
        (dict(scheme="int8", shard_bytes=10**6), "started with shards of bytes 5000000000, this run has 1000000"),
        (dict(scheme="int8", smooth=0.5, calibration=[[5, 6, 7]]), "started with --smooth None, this run has 0.5"),
    ],
)
def test_other_options_do_not_go_on(tiny: Path, unfinished: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"dst.partial was {message}: use the same, or remove the directory"):
        quantize_checkpoint(tiny, unfinished, **options)


def test_a_changed_source_does_not_go_on(tiny: Path, unfinished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    (other / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(UserError, match="dst.partial was started with an SRC of contents [0-9a-f]{12}, this run has "):
        quantize_checkpoint(other, unfinished, "int8")
    moved = shutil.copytree(tiny, tmp_path / "moved")
    quantize_checkpoint(moved, unfinished, "int8")
    assert unfinished.exists() and not unfinished.with_name("dst.partial").exists()


def test_targets_that_are_in_the_way(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    with pytest.raises(UserError, match="dst exists: name a directory that does not"):
        quantize_checkpoint(tiny, tmp_path / "dst", "int8")
    with pytest.raises(UserError, match="absent does not exist: make the directory"):
        quantize_checkpoint(tiny, tmp_path / "absent" / "dst", "int8")
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="mine.partial exists and holds no unfinished conversion"):
        quantize_checkpoint(tiny, tmp_path / "mine", "int8")
    assert [file.name for file in (tmp_path / "mine.partial").iterdir()] == ["thesis.txt"]


def test_two_runs_at_once(tmp_path: Path) -> None:
    with Workspace(tmp_path / "dst", {"a": 1}):
        with pytest.raises(UserError, match="another run is writing .*dst: wait for it"):
            Workspace(tmp_path / "dst", {"a": 1})
    with Workspace(tmp_path / "dst", {"a": 1}) as again:
        assert again.resumed


def test_too_little_disk(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(UserError, match=r"has 0.1 MB free, the conversion needs \d.\d MB more: make room"):
        quantize_checkpoint(tiny, tmp_path / "dst", "int8")


def test_json_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with Workspace(tmp_path / "dst", {"--scheme": "int8"}) as workspace:
        file = workspace.state / "x.json"
        workspace.write_json(file, {"a": [1]})
        with pytest.raises(TypeError):
            workspace.write_json(file, {"a": object()})
        assert json.loads(file.read_text()) == {"a": [1]}
