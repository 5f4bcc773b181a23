"""--deep: every byte is looked at, against numpy and torch; and the command around it."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from checkpoints import rewrite
from damage import Report, check_directory, copy_demo, copy_sharded, findings
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from hunyuan_vllm.check.deep import CHUNK, check_values, read_through
from hunyuan_vllm.checkpoint import read_shards
from hunyuan_vllm.cli import app
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Section, Status
from hunyuan_vllm.util.progress import Progress

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


def silent() -> Progress:
    return Progress(Console(quiet=True))


def deep(directory: Path) -> Report:
    return check_directory(directory, silent(), jobs=2)


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
    not_finite, zero = read_through(shard.file, shard.tensors, lambda size: None, Event())
    values = tensors["bits"].double()
    assert {tensor.name: count for tensor, count in not_finite.items()} == {"bits": int((~values.isfinite()).sum())}
    assert {tensor.name: size for tensor, size in zero.items()} == {"zero": minus_zero.nbytes}


def test_tensors_with_nan_zeros_and_holes(tmp_path: Path) -> None:
    up, down = "model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.1.mlp.experts.1.up_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[up][3, 4] = float("nan")
        tensors[up][3, 5] = float("-inf")
        tensors[down].zero_()
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.full((192,), float("nan"))  # not used

    rewrite(copy_demo(tmp_path), change)
    assert check_directory(tmp_path).sound
    problems = findings(deep(tmp_path))
    assert [problem.items for problem in problems] == [(f"{up} (2 of 24,576)",), (down,)]


def test_a_hole_in_a_large_tensor(tmp_path: Path) -> None:
    tensors = {name: torch.ones(3, CHUNK) for name in ("model.embed_tokens.weight", "model.norm.weight")}
    for tensor in tensors.values():
        tensor[1] = 0  # 4 MiB
    save_file(tensors, tmp_path / "a.safetensors")
    shards = read_shards([tmp_path / "a.safetensors"])
    section = Section("Data")
    check_values(shards, {tensor: () for tensor in shards[0].tensors}, 1, silent(), section)
    (problem,) = [finding for finding in section.findings if finding.status == Status.PROBLEM]
    (item,) = problem.items  # padding rows of an embedding may be zeros
    assert item in ("model.norm.weight (3 MiB)", "model.norm.weight (4 MiB)")  # by where chunks begin


def test_the_command_and_its_exit_status(tmp_path: Path) -> None:
    copy_demo(tmp_path)
    result = command(str(tmp_path), "--deep")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("nothing wrong\n") and "hunyuan-vllm plan --model" in result.stdout
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
        (["{directory}"], "has no config.json: copy it from the checkpoint"),
        (["{directory}/file"], "is a file"),
        (["nobody/never-downloaded"], "neither a directory nor in the hub's cache"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").touch()
    result = command(*(argument.format(directory=tmp_path) for argument in arguments))
    assert isinstance(result.exception, UserError)  # main() prints it and exits with 2
    assert message in str(result.exception)


def test_ctrl_c_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_sharded(tmp_path)
    shards = read_shards(sorted(tmp_path.glob("*.safetensors")))
    read: list[int] = []

    def press(self: Progress, size: int) -> None:
        read.append(size)
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "advance", press)
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    with pytest.raises(KeyboardInterrupt):
        check_values(shards, dict.fromkeys(tensors), 2, silent(), Section("Data"))
    assert sum(read) < sum(tensor.nbytes for tensor in tensors)  # a chunk of each file at most
    result = command(str(tmp_path), "--deep")
    assert result.exit_code == 130 and "interrupted" in result.stderr
