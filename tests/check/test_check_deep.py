"""--deep: every byte is hashed and looked at, against numpy, hashlib and git; and the command around it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import rewrite
from damage import Report, check_folder, copy_demo, copy_sharded, findings
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from hunyuan_vllm.check.deep import CHUNK, Deep, Interrupted, read_through
from hunyuan_vllm.checkpoint import read_shards
from hunyuan_vllm.cli import app
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Section, Status

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


def deep(folder: Path, write_sums: bool = False) -> Report:
    def run(work: Deep, section: Section) -> None:
        read: list[int] = []
        work.run(read.append, section)
        assert sum(read) == work.total

    return check_folder(folder, run, write_sums, jobs=2)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", *arguments])


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])
def test_values_are_judged_as_numpy_and_torch_judge_them(tmp_path: Path, dtype: torch.dtype) -> None:
    """Random bit patterns of every type: the count of values that are not finite is the same."""
    size = (CHUNK // dtype.itemsize) * 2 + 12345
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 256, size * dtype.itemsize, np.uint8))
    finite = torch.ones(64).to(dtype)
    minus_zero = (-torch.zeros(64)).to(dtype)
    tensors = {"bits": bits.view(dtype), "finite": finite, "zero": minus_zero}
    save_file(tensors, tmp_path / "a.safetensors")
    (shard,) = read_shards([tmp_path / "a.safetensors"])
    content = read_through(shard.file, shard.tensors, [hashlib.sha256()], lambda size: None)
    values = tensors["bits"].double()
    assert {tensor.name: count for tensor, count in content.not_finite.items()} == {
        "bits": int((~values.isfinite()).sum())
    }
    assert {tensor.name: size for tensor, size in content.zero.items()} == {"zero": minus_zero.nbytes}
    assert content.digests == [hashlib.sha256(shard.file.read_bytes()).hexdigest()]


def test_tensors_with_nan_zeros_and_holes(tmp_path: Path) -> None:
    up, down = "model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.1.mlp.experts.1.up_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[up][3, 4] = float("nan")
        tensors[up][3, 5] = float("-inf")
        tensors[down].zero_()
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.full((192,), float("nan"))  # not used

    rewrite(copy_demo(tmp_path), change)
    assert check_folder(tmp_path).sound
    problems = findings(deep(tmp_path))
    assert [problem.items for problem in problems] == [(f"{up} (2 of 24,576)",), (down,)]


def test_a_hole_in_a_large_tensor(tmp_path: Path) -> None:
    tensors = {name: torch.ones(3, CHUNK) for name in ("model.embed_tokens.weight", "model.norm.weight")}
    for tensor in tensors.values():
        tensor[1] = 0  # 4 MiB
    save_file(tensors, tmp_path / "a.safetensors")
    shards = read_shards([tmp_path / "a.safetensors"])
    section = Section("Data")
    work = Deep(tmp_path, shards, {tensor: () for tensor in shards[0].tensors}, write_sums=False, jobs=1)
    work.run(lambda size: None, section)
    (problem,) = [finding for finding in section.findings if finding.status == Status.PROBLEM]
    (item,) = problem.items  # padding rows of an embedding may be zeros
    assert item in ("model.norm.weight (3 MiB)", "model.norm.weight (4 MiB)")  # by where chunks begin


def test_sums_are_written_compared_and_read_by_coreutils(tmp_path: Path) -> None:
    copy_sharded(tmp_path)
    assert [skip.subject for skip in findings(deep(tmp_path), Status.SKIPPED)] == ["hashes"]
    assert deep(tmp_path, write_sums=True).sound
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)
    report = deep(tmp_path)
    assert report.sound and not findings(report, Status.SKIPPED)

    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1  # a value changes a little, which nothing but the hash can see
    shard.write_bytes(data)
    (tmp_path / "tokenizer_config.json").unlink()
    changed, absent = findings(deep(tmp_path, write_sums=True))
    assert changed.items == (shard.name,)
    assert absent.items == ("tokenizer_config.json",)
    assert not list(tmp_path.glob(".SHA256SUMS*"))
    assert "tokenizer_config.json" in (tmp_path / "SHA256SUMS").read_text()  # not written anew over the problem


def test_the_hubs_notes_are_compared(tmp_path: Path) -> None:
    """As huggingface_hub leaves them: SHA-256 of large files, git's hash of small ones."""
    copy_demo(tmp_path)
    notes = tmp_path / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    git = subprocess.run(["git", "hash-object", config], capture_output=True, text=True, check=True).stdout.strip()
    sha = hashlib.sha256(weights.read_bytes()).hexdigest()
    (notes / "config.json.metadata").write_text(f"{'0' * 40}\n{git}\n1700000000.0\n")
    (notes / "model.safetensors.metadata").write_text(f"{'0' * 40}\n{sha}\n1700000000.0\n")
    assert deep(tmp_path).sound
    config.write_text(config.read_text() + " ")
    assert [problem.items for problem in findings(deep(tmp_path))] == [("config.json",)]


def test_the_hubs_cache_is_compared(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    copy_demo(source)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blobs / digest)
        (snapshot / file.name).symlink_to(blobs / digest)
    assert deep(snapshot).sound
    weights = (snapshot / "model.safetensors").resolve()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert [problem.items for problem in findings(deep(snapshot))] == [("model.safetensors",)]


def test_a_run_ends_where_it_is_interrupted(tmp_path: Path) -> None:
    copy_demo(tmp_path)

    def stop(size: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        read_through(tmp_path / "model.safetensors", (), [], stop)


def test_the_command_and_its_exit_status(tmp_path: Path) -> None:
    copy_demo(tmp_path)
    result = command(str(tmp_path), "--deep", "--write-sums")
    assert result.exit_code == 0, result.output
    assert "sound: " in result.stdout and "hunyuan-vllm plan --model" in result.stdout
    assert "\x1b" not in result.stdout
    (tmp_path / "hy.tiktoken").unlink()
    result = command(str(tmp_path), "--deep", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["sound"] is False and report["parameters"] > 3e6
    found = [finding for section in report["sections"] for finding in section["findings"]]
    assert {"ok", "problem", "skipped"} == {finding["status"] for finding in found}
    assert all(finding["remedy"] for finding in found if finding["status"] in ("problem", "warning"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/at/all"], "does not exist"),
        (["{folder}"], "has no config.json: copy it from the checkpoint"),
        (["{folder}/file"], "is a file"),
        (["nobody/never-downloaded"], "neither a directory nor in the hub's cache"),
        (["{folder}", "--write-sums"], "--write-sums needs --deep"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").touch()
    result = command(*(argument.format(folder=tmp_path) for argument in arguments))
    assert isinstance(result.exception, UserError)  # main() prints it and exits with 2
    assert message in str(result.exception)


def test_sums_are_refused_before_the_work_where_they_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_demo(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for a user who is not root
    assert "is not writable" in str(command(str(tmp_path), "--deep", "--write-sums").exception)


def test_ctrl_c_ends_the_run_at_once_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_sharded(tmp_path)
    shards = read_shards(sorted(tmp_path.glob("*.safetensors")))
    read: list[int] = []

    def press(size: int) -> None:
        read.append(size)
        raise KeyboardInterrupt

    work = Deep(tmp_path, shards, {}, write_sums=True, jobs=2)
    with pytest.raises(KeyboardInterrupt):
        work.run(press, Section("Data"))
    assert sum(read) < work.total  # a chunk of each file at most
    assert not (tmp_path / "SHA256SUMS").exists()

    monkeypatch.setattr(Deep, "run", lambda self, advance, section: press(0))
    result = command(str(tmp_path), "--deep", "--write-sums")
    assert result.exit_code == 130 and "interrupted" in result.stderr
