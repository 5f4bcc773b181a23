"""The files of a checkpoint: its directory, its shards, its index"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hunyuan_vllm import demo
from hunyuan_vllm.checkpoint import (
    INDEX_FILE,
    LFS_POINTER,
    Shard,
    StoredTensor,
    missing_config,
    missing_weights,
    read_index,
)
from hunyuan_vllm.layout import CheckpointError
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.text import HUB_NAME, gigabytes, plural, some

SHARD_NUMBER = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
CACHE_SCALES = "kv_cache_scales.safetensors"  # of an FP8 cache; published beside the shards, not in the index
AGAIN = "download them again; an interrupted download resumes with the same command"


def open_directory(given: str) -> Path:
    """The directory of a checkpoint, of a downloaded hub repository, or of the demo model (`demo`)."""
    directory = Path(given).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").exists() and not any(directory.glob("model*.safetensors*")):
            raise UserError(f"{given} {': '.join(missing_config(directory))}")
        return directory.resolve()
    if given == demo.NAME:
        return demo.path()
    if directory.exists():
        raise UserError(f"{given} is a file: give the directory that holds config.json")
    if HUB_NAME.fullmatch(given):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(given, local_files_only=True))
        except LocalEntryNotFoundError:
            raise UserError(f"{given} is neither a directory nor in the hub's cache: download it first") from None
    raise UserError(f"{given} does not exist: give a checkpoint's directory, or {demo.NAME}")


def list_files(directory: Path, section: Section) -> tuple[list[Path], dict[str, Any] | None]:
    """The shards that vLLM will read, and the index, None if it is absent or unreadable; files that are missing,
    unfinished or not the real content are reported."""
    there = sorted(path for path in directory.glob("*.safetensors") if path.exists())
    _check_links(directory, section)
    shards, index = there, None
    try:
        index = read_index(directory)
    except CheckpointError:
        section.problem(INDEX_FILE, "it is not a safetensors index", "download it again")
    if index is None:
        _check_numbers(there, section)
    else:
        named = sorted(set(index["weight_map"].values()))
        shards = [directory / name for name in named if (directory / name).exists()]
        if absent := [name for name in named if not (directory / name).exists()]:
            text = f"{len(absent)} of {len(named)} in the index are missing: {some(absent)}"
            section.problem("shards", text, AGAIN, absent)
        if extra := [path.name for path in there if path not in shards and path.name != CACHE_SCALES]:
            text = f"not in the index, so not read by vLLM: {some(extra)}"
            section.warning("shards", text, f"delete them, or download {INDEX_FILE} again if they belong to it", extra)
    if not shards:
        what, remedy = missing_weights(directory)
        section.problem("shards", f"the directory {what}", remedy)
    return shards, index


def check_shards(shards: Sequence[Shard], section: Section) -> None:
    """Report damaged files, or the number and size of sound ones."""
    damaged = [shard for shard in shards if shard.fault]
    for shard in damaged:
        section.problem(shard.file.name, f"it {shard.fault}", f"download {shard.file.name} again")
    if shards and not damaged:
        stored = sum(shard.size for shard in shards)
        section.ok("shards", f"{plural(len(shards), 'complete file')}, {gigabytes(stored)}")


def check_index(index: dict[str, Any], tensors: Sequence[StoredTensor], absent: bool, section: Section) -> None:
    """Compare the index with what the shards' headers hold.

    Args:
        absent: some shard is missing or damaged, so the total cannot be compared.
    """
    weight_map: dict[str, str] = index["weight_map"]
    held = {(tensor.name, tensor.file.name) for tensor in tensors}
    files = {tensor.file.name for tensor in tensors}
    wrong = [f"{name} (in {file}?)" for name, file in weight_map.items() if (name, file) not in held and file in files]
    unlisted = [tensor.name for tensor in tensors if tensor.name not in weight_map]
    remedy = f"{INDEX_FILE} is from another version of the checkpoint: download it and the shards again"
    if wrong:
        text = f"{plural(len(wrong), 'tensor')} not in the shard that the index names"
        section.problem("index", text, remedy, wrong)
    if unlisted:
        section.warning("index", f"{plural(len(unlisted), 'tensor')} of the shards missing from it", remedy, unlisted)
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    stored = sum(tensor.nbytes for tensor in tensors)
    miscounts = not absent and total is not None and total != stored
    if miscounts:
        text = f"total_size is {total}, the shards' tensors have {stored} bytes"
        section.warning("index", text, f"{remedy}, unless it was written by a tool that counts otherwise")
    if not (wrong or unlisted or miscounts):
        section.ok("index", f"{len(weight_map):,} tensors, each in the shard it names")


def _check_links(directory: Path, section: Section) -> None:
    files = [path for path in sorted(directory.iterdir()) if not path.is_dir()]
    if dangling := [path.name for path in files if not path.exists()]:
        section.problem("links", f"broken: {some(dangling)}", AGAIN, dangling)
    if pointers := [path.name for path in files if path.suffix != ".safetensors" and _is_pointer(path)]:
        text = f"Git LFS pointers instead of the files: {some(pointers)}"
        section.problem("files", text, "run `git lfs pull` in the directory", pointers)
    unfinished = [
        path.name for cache in (".cache", ".huggingface") for path in (directory / cache).rglob("*.incomplete")
    ]
    if unfinished:
        text = f"{plural(len(unfinished), 'unfinished file')} in the hub's download directory"
        section.warning("download", text, "run the download again; it resumes where it stopped", unfinished)


def _is_pointer(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
    return False


def _check_numbers(files: Sequence[Path], section: Section) -> None:
    """Numbered shards tell how many there should be, even without an index."""
    numbered = [match for path in files if (match := SHARD_NUMBER.fullmatch(path.name))]
    for stem, count in sorted({(match[1], match[3]) for match in numbered}):
        present = {int(match[2]) for match in numbered if (match[1], match[3]) == (stem, count)}
        wanted = range(1, int(count) + 1)
        if absent := [f"{stem}-{n:05}-of-{count}.safetensors" for n in wanted if n not in present]:
            section.problem("shards", f"{len(absent)} of {int(count)} are missing: {some(absent)}", AGAIN, absent)
    if numbered:
        text = f"there is no {INDEX_FILE}, and the shards are numbered: vLLM reads every safetensors file"
        section.warning("index", text, f"download {INDEX_FILE}")
