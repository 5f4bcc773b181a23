"""Files written tensor by tensor are what the library reads."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hunyuan_vllm.quantize.formats import Spec
from hunyuan_vllm.quantize.source import Unit
from hunyuan_vllm.quantize.writer import Shard, ShardWriter, index_of, plan_shards

TENSORS = {
    "b.weight": torch.randn(3, 5).to(torch.float8_e4m3fn),
    "a.norm": torch.randn(7).bfloat16(),
    "a.scale": torch.tensor(0.25),
    "b.packed": torch.randint(-(2**31), 2**31 - 1, (2, 3), dtype=torch.int32),
    "b.shape": torch.tensor([2, 12]),
    "b.levels": torch.randint(-127, 128, (3, 3), dtype=torch.int8),
    "half": torch.randn(2, 2).half(),
}
SPECS = [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


@pytest.mark.parametrize("order", [list(TENSORS), list(reversed(TENSORS))])
def test_any_order_gives_the_same_file(tmp_path: Path, order: list[str]) -> None:
    file = tmp_path / "a.safetensors"
    with ShardWriter(file, SPECS) as writer:
        for name in order:
            writer.write(name, TENSORS[name])
    read = load_file(file)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    with safe_open(file, framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}


def test_what_was_not_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"half is torch.float32 \[2, 2\], planned torch.float16"):
        with ShardWriter(tmp_path / "a", SPECS) as writer:
            writer.write("half", torch.zeros(2, 2))
    with pytest.raises(ValueError, match="6 planned tensors were not written, a.norm first"):
        with ShardWriter(tmp_path / "b", SPECS) as writer:
            writer.write("half", TENSORS["half"])


def test_a_full_disk_shows_before_a_tensor_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        ShardWriter(tmp_path / "a", SPECS)


def unit(name: str, *shapes: tuple[int, ...]) -> tuple[Unit, list[Spec]]:
    specs = [Spec(f"{name}.{number}", torch.int8, shape) for number, shape in enumerate(shapes)]
    return Unit((name,), quantised=True), specs


def test_units_stay_whole_and_files_below_the_limit() -> None:
    shards = plan_shards([unit("a", (60,)), unit("b", (30,), (20,)), unit("c", (300,)), unit("d", (1,))], 100)
    assert [[u.names[0] for u in shard.units] for shard in shards] == [["a"], ["b"], ["c"], ["d"]]
    assert [shard.nbytes for shard in shards] == [60, 50, 300, 1]
    assert [shard.file for shard in shards] == [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    index = index_of(shards)
    assert index["metadata"] == {"total_size": 411}
    assert index["weight_map"]["b.1"] == "model-00002-of-00004.safetensors"


def test_what_fits_into_one_file_has_the_plain_name() -> None:
    (shard,) = plan_shards([unit("a", (60,)), unit("b", (30,))], 90)
    assert isinstance(shard, Shard) and shard.file == "model.safetensors" and len(shard.units) == 2
