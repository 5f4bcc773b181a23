"""The files of a checkpoint: folder, shards, digests"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hunyuan_vllm import demo
from hunyuan_vllm.checkpoint import INDEX_FILE, missing_config, missing_weights, read_index
from hunyuan_vllm.layout import CheckpointError, Shape
from hunyuan_vllm.server.models import HUB_NAME
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import replacing
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.text import some

SUMS_FILE = "SHA256SUMS"
SUMS_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
NOTES = (".cache/huggingface/download", ".huggingface/download")


@dataclass(frozen=True)
class Digest:
    """A hash in hexadecimal and who says so. 64 digits are SHA-256; 40 are Git's, which the hub has of small files."""

    value: str
    source: str

    def hasher(self, size: int) -> hashlib._Hash:
        """A fresh hash object of that kind, for a file of `size` bytes."""
        if len(self.value) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def plain_files(folder: Path) -> list[Path]:
    """The checkpoint's files: all at its top, but hidden ones and the list of sums itself."""
    files = (path for path in folder.iterdir() if path.is_file())
    return sorted(path for path in files if not path.name.startswith(".") and path.name != SUMS_FILE)


def known_digests(folder: Path) -> dict[str, Digest]:
    """File name → hash; SHA256SUMS counts most. Raises OSError if that cannot be read."""
    found: dict[str, Digest] = {}
    for path in plain_files(folder):
        if path.is_symlink() and path.resolve().parent.name == "blobs":
            _add(found, path.name, path.resolve().name, "the hub's cache")
    for notes in NOTES:
        for path in (folder / notes).glob("*.metadata"):
            lines = path.read_text(errors="replace").splitlines()
            _add(found, path.name.removesuffix(".metadata"), lines[1] if len(lines) > 1 else "", "the hub's download")
    if (folder / SUMS_FILE).exists():
        for line in (folder / SUMS_FILE).read_text(errors="replace").splitlines():
            if match := SUMS_LINE.fullmatch(line.strip()):
                _add(found, match[2], match[1], SUMS_FILE)
    return found


def write_sums(folder: Path, sums: Mapping[str, str]) -> Path:
    """Write SHA256SUMS, as `sha256sum --check` reads it."""
    target = folder / SUMS_FILE
    with replacing(target) as temporary:
        temporary.write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    return target


def _add(found: dict[str, Digest], name: str, value: str, source: str) -> None:
    value = value.strip().strip('"').lower()
    if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", value):
        found[name] = Digest(value, source)


ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
MOST_HEADER_BYTES = 100_000_000  # the format's own limit
LFS_POINTER = b"version https://git-lfs"
READERS = 16  # on a network file system, waiting is most of reading a header


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its type as safetensors names it, and its bytes at `file[start : start + nbytes]`."""

    name: str
    dtype: str
    shape: Shape
    file: Path
    start: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """A file, its tensors in the order of their bytes, and what is wrong with it in `fault`, "" if nothing is.

    A shard with a fault has the tensors that its header names, if it could be read.
    """

    file: Path
    size: int
    tensors: tuple[StoredTensor, ...]
    fault: str = ""


def read_shards(files: Sequence[Path]) -> list[Shard]:
    """Read the headers of `files`, in their order."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(_read, files))


def _read(path: Path) -> Shard:
    size = 0
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start + file.read(len(LFS_POINTER) - 8) == LFS_POINTER:
                return Shard(path, size, (), "is a Git LFS pointer, not the file it stands for")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= MOST_HEADER_BYTES:
                return Shard(path, size, (), "is empty" if not size else "does not start as a safetensors file does")
            file.seek(8)
            header = json.loads(file.read(length))
        tensors = tuple(sorted(_tensors(path, header, 8 + length), key=lambda tensor: tensor.start))
        fault = _fault(tensors, 8 + length, size)
    except OSError as error:
        return Shard(path, size, (), f"cannot be read ({error.strerror})")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        what = "is cut short inside its header" if size < 8 + length else f"has a header that cannot be read ({error})"
        return Shard(path, size, (), what)
    return Shard(path, size, tensors, fault)


def _tensors(path: Path, header: Any, data: int) -> Iterator[StoredTensor]:
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, data + begin, end - begin)


def _fault(tensors: Sequence[StoredTensor], data: int, size: int) -> str:
    position = data
    for tensor in tensors:
        if tensor.dtype not in ITEM_BYTES:
            return f"has {tensor.name!r} in the unknown type {tensor.dtype!r}"
        if tensor.start != position or tensor.nbytes != tensor.elements * ITEM_BYTES[tensor.dtype]:
            return f"has a header whose offsets do not fit its shapes, at {tensor.name!r}"
        position += tensor.nbytes
    if position > size:
        return f"is cut short: {size:,} of {position:,} bytes are there"
    return f"has {size - position:,} bytes behind its last tensor" if position < size else ""


SHARD_NUMBER = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
AGAIN = "download them again; an interrupted download goes on with the same command"


@dataclass
class Contents:
    """A checkpoint's files.

    Attributes:
        shards: the safetensors files that vLLM will read.
        extra: those that the index leaves out, which it will not.
        index: model.safetensors.index.json; None without one, or without a readable one.
    """

    folder: Path
    shards: list[Path] = field(default_factory=list)
    extra: list[Path] = field(default_factory=list)
    index: dict[str, Any] | None = None


def open_folder(given: str) -> Path:
    """The folder of a checkpoint, of a hub name that has been downloaded, or of the demo model (`demo`).

    Raises:
        UserError: there is none; a missing or empty checkpoint is a wrong argument, not an unsound checkpoint.
    """
    folder = Path(given).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists() and not any(folder.glob("model*.safetensors*")):
            raise UserError(f"{given} {': '.join(missing_config(folder))}")
        return folder.resolve()
    if given == demo.NAME:
        return demo.path()
    if folder.exists():
        raise UserError(f"{given} is a file: name the folder that holds config.json")
    if HUB_NAME.fullmatch(given):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(given, local_files_only=True))
        except LocalEntryNotFoundError:
            raise UserError(f"{given} is neither a folder nor in the hub's cache: download it first") from None
    raise UserError(f"{given} does not exist: name a checkpoint's folder, or {demo.NAME}")


def look_at(folder: Path, section: Section) -> Contents:
    """List the folder's shards; `section` gets what is absent, unfinished or not a file's real content."""
    contents = Contents(folder)
    there = sorted(path for path in folder.glob("*.safetensors") if path.exists())
    _check_links(folder, section)
    try:
        contents.index = read_index(folder)
    except CheckpointError:
        section.problem(INDEX_FILE, "it is not a safetensors index", "download it again")
    if contents.index is None:
        contents.shards = there
        _check_numbers(there, section)
    else:
        named = sorted(set(contents.index["weight_map"].values()))
        contents.shards = [folder / name for name in named if (folder / name).exists()]
        contents.extra = [path for path in there if path not in contents.shards]
        if absent := [name for name in named if not (folder / name).exists()]:
            text = f"{len(absent)} of {len(named)} that the index names are not here: {some(absent)}"
            section.problem("shards", text, AGAIN, absent)
        if contents.extra:
            names = [path.name for path in contents.extra]
            text = f"not in the index, so not read by vLLM: {some(names)}"
            section.warning("shards", text, f"delete them, or download {INDEX_FILE} again if they belong to it", names)
    if not contents.shards:
        what, remedy = missing_weights(folder)
        section.problem("shards", f"the folder {what}", remedy)
    return contents


def check_shards(shards: Sequence[Shard], section: Section) -> None:
    """Report damaged files, or the number and size of sound ones."""
    damaged = [shard for shard in shards if shard.fault]
    for shard in damaged:
        section.problem(shard.file.name, f"it {shard.fault}", f"download {shard.file.name} again")
    if shards and not damaged:
        stored = sum(shard.size for shard in shards)
        size = f"{stored / 1e9:,.1f} GB" if stored >= 1e9 else f"{stored / 1e6:,.1f} MB"
        section.ok("shards", f"{len(shards)} complete, {size}")


def check_index(index: dict[str, Any], tensors: Sequence[StoredTensor], absent: bool, section: Section) -> None:
    """Compare the index with what the shards' headers hold.

    Args:
        absent: some shard is not here or damaged, so that what it should hold and the total cannot be compared.
    """
    weight_map: dict[str, str] = index["weight_map"]
    held = {(tensor.name, tensor.file.name) for tensor in tensors}
    files = {tensor.file.name for tensor in tensors}
    wrong = [f"{name} (in {file}?)" for name, file in weight_map.items() if (name, file) not in held and file in files]
    unlisted = [tensor.name for tensor in tensors if tensor.name not in weight_map]
    remedy = f"{INDEX_FILE} is from another version of the checkpoint: download it and the shards again"
    before = len(section.findings)
    if wrong:
        text = f"{len(wrong):,} tensors are not in the shard that the index names"
        section.problem("index", text, remedy, wrong)
    if unlisted:
        section.warning("index", f"{len(unlisted):,} tensors of the shards are not in it", remedy, unlisted)
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    stored = sum(tensor.nbytes for tensor in tensors)
    if not absent and total is not None and total != stored:
        text = f"total_size is {total}, the shards' tensors have {stored} bytes"
        section.warning("index", text, f"{remedy}, unless it was written by a tool that counts otherwise")
    if len(section.findings) == before:
        section.ok("index", f"{len(weight_map):,} tensors, each where it says")


def _check_links(folder: Path, section: Section) -> None:
    files = [path for path in sorted(folder.iterdir()) if not path.is_dir()]
    if dangling := [path.name for path in files if not path.exists()]:
        section.problem("links", f"lead nowhere: {some(dangling)}", AGAIN, dangling)
    if pointers := [path.name for path in files if path.suffix != ".safetensors" and _is_pointer(path)]:
        text = f"Git LFS pointers instead of the files: {some(pointers)}"
        section.problem("files", text, "run `git lfs pull` in the folder", pointers)
    unfinished = [path.name for cache in (".cache", ".huggingface") for path in (folder / cache).rglob("*.incomplete")]
    if unfinished:
        text = f"{len(unfinished)} unfinished in the hub's download folder"
        section.warning("download", text, "run the download again; it goes on where it stopped", unfinished)


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def _check_numbers(files: Sequence[Path], section: Section) -> None:
    """Shards without an index still say how many there should be."""
    numbered = [match for path in files if (match := SHARD_NUMBER.fullmatch(path.name))]
    for stem, count in sorted({(match[1], match[3]) for match in numbered}):
        present = {int(match[2]) for match in numbered if (match[1], match[3]) == (stem, count)}
        wanted = range(1, int(count) + 1)
        if absent := [f"{stem}-{n:05}-of-{count}.safetensors" for n in wanted if n not in present]:
            section.problem("shards", f"{len(absent)} of {int(count)} are not here: {some(absent)}", AGAIN, absent)
    if numbered:
        text = f"there is none, and the shards are numbered: vLLM reads whatever lies here (no {INDEX_FILE})"
        section.warning("index", text, f"download {INDEX_FILE}")
