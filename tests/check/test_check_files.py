"""Shards, index and downloads: each way in which files go wrong is named, together with all others."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config, write_checkpoint
from damage import check_directory, copy_demo, copy_sharded, findings, only_problem
from safetensors.torch import load_file, save_file

from hunyuan_vllm import demo
from hunyuan_vllm.check.files import open_directory
from hunyuan_vllm.checkpoint import read_shards
from hunyuan_vllm.server.models import open_model
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Status

INDEX = "model.safetensors.index.json"


def shards_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def test_a_sound_checkpoint_has_nothing_but_ok(tmp_path: Path) -> None:
    report = check_directory(copy_sharded(tmp_path))
    assert report.sound
    assert {finding.status for section in report.sections for finding in section.findings} == {Status.OK}
    sizes = {name: tensor.numel() for path in shards_of(tmp_path) for name, tensor in load_file(path).items()}
    idle = sum(size for name, size in sizes.items() if ".experts." in name) * 3 // 4  # top-1 of 4
    assert report.parameters == (sum(sizes.values()), sum(sizes.values()) - idle)
    assert report.stored_bytes == sum(path.stat().st_size for path in shards_of(tmp_path))


def test_the_demo_model_has_a_name() -> None:
    assert open_directory(demo.NAME) == demo.path()


def test_headers_are_those_that_the_library_reads(tmp_path: Path) -> None:
    """Names, shapes and the very bytes, against safetensors' own loader."""
    write_checkpoint(tmp_path, tiny_config(), shard_bytes=100_000)
    shards = read_shards(shards_of(tmp_path))
    assert len(shards) > 3
    for shard in shards:
        assert shard.fault == ""
        loaded = load_file(shard.file)
        assert {tensor.name: tensor.shape for tensor in shard.tensors} == {
            name: tuple(tensor.shape) for name, tensor in loaded.items()
        }
        data = shard.file.read_bytes()
        for tensor in shard.tensors:
            raw = loaded[tensor.name].flatten().view(dtype=torch.uint8).numpy().tobytes()
            assert data[tensor.start : tensor.start + tensor.nbytes] == raw


@pytest.mark.parametrize("cut", [0, 5, 100, 200_000])
def test_a_shard_cut_short(tmp_path: Path, cut: int) -> None:
    copy_sharded(tmp_path)
    shard = shards_of(tmp_path)[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:cut])
    problem = only_problem(tmp_path)
    assert problem.subject == shard.name
    expected = {0: "is empty", 5: "does not start like", 100: "truncated inside its header"}
    assert expected.get(cut, f"truncated: {cut:,} of {len(whole):,} bytes") in problem.text


def test_other_damage_to_a_shard(tmp_path: Path) -> None:
    copy_sharded(tmp_path)
    longer, no_json, offsets, pointer = shards_of(tmp_path)[:4]
    longer.write_bytes(longer.read_bytes() + b"\0" * 7)
    no_json.write_bytes(struct.pack("<Q", 16) + b"not JSON at all!" + b"\0" * 100)
    data = offsets.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"][0] += 1
    changed = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    offsets.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + size :])
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    found = {problem.subject: problem.text for problem in findings(check_directory(tmp_path))}
    assert "7 bytes after its last tensor" in found[longer.name]
    assert "header that cannot be read" in found[no_json.name]
    assert "offsets do not fit its shapes" in found[offsets.name]
    assert "Git LFS pointer" in found[pointer.name]
    assert "1 tensor of another shape" in found["shapes"]  # which the header is the cause of
    assert len(found) == 5


def test_missing_shards_are_all_named_and_their_tensors_are_not_called_missing(tmp_path: Path) -> None:
    copy_sharded(tmp_path)
    gone = shards_of(tmp_path)[1:3]
    for shard in gone:
        shard.unlink()
    problem = only_problem(tmp_path)
    assert problem.items == tuple(shard.name for shard in gone)


def test_numbered_shards_without_an_index_still_tell_which_is_missing(tmp_path: Path) -> None:
    copy_sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    gone = shards_of(tmp_path)[2]
    gone.unlink()
    report = check_directory(tmp_path)
    assert [problem.items for problem in findings(report)] == [(gone.name,)]
    assert [warning.subject for warning in findings(report, Status.WARNING)] == ["index"]


def test_a_shard_that_the_index_leaves_out(tmp_path: Path) -> None:
    copy_sharded(tmp_path)
    save_file(load_file(shards_of(tmp_path)[0]), tmp_path / "extra.safetensors")
    report = check_directory(tmp_path)
    assert report.sound
    (warning,) = findings(report, Status.WARNING)
    assert warning.items == ("extra.safetensors",)


def test_an_index_that_names_the_wrong_shards(tmp_path: Path) -> None:
    copy_sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    names = sorted(index["weight_map"])
    first, second = (index["weight_map"][name] for name in (names[0], names[-1]))
    assert first != second
    index["weight_map"] |= {names[0]: second, names[-1]: first, "made.up": first}
    del index["weight_map"][names[1]]
    index["metadata"]["total_size"] += 2
    (tmp_path / INDEX).write_text(json.dumps(index))
    report = check_directory(tmp_path)
    (problem,) = findings(report)
    assert {item.split(" ")[0] for item in problem.items} == {names[0], names[-1], "made.up"}
    unlisted, total = findings(report, Status.WARNING)
    assert unlisted.items == (names[1],)
    assert "total_size" in total.text


def test_an_index_that_is_no_index(tmp_path: Path) -> None:
    copy_sharded(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    assert only_problem(tmp_path).subject == INDEX


def test_unfinished_downloads_and_dangling_links(tmp_path: Path) -> None:
    copy_demo(tmp_path)
    cache = tmp_path / ".cache" / "huggingface" / "download"
    cache.mkdir(parents=True)
    (cache / "abc.incomplete").touch()
    (tmp_path / "README.md").symlink_to(tmp_path / "blobs" / "gone")
    report = check_directory(tmp_path)
    assert [warning.items for warning in findings(report, Status.WARNING)] == [("abc.incomplete",)]
    assert [problem.items for problem in findings(report)] == [("README.md",)]


def test_pickled_weights_are_converted_by_the_command_that_is_named(tmp_path: Path) -> None:
    file = copy_demo(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    file.unlink()
    problem = only_problem(tmp_path)
    assert "has pickled weights (*.bin) and no *.safetensors" in problem.text
    command = problem.remedy.removeprefix("convert them with ").replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, check=True)
    assert not findings(check_directory(tmp_path))
    converted = load_file(tmp_path / "pytorch_model.safetensors")
    assert all(torch.equal(converted[name], tensor) for name, tensor in tensors.items())


def test_a_directory_of_checkpoints(tmp_path: Path) -> None:
    """As the published repository is laid out."""
    for name in ("Instruct", "Pretrain"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    for opened in (open_directory, open_model):
        with pytest.raises(UserError, match=r"its subdirectories are \(Instruct, Pretrain\): name one of them"):
            opened(str(tmp_path))
