"""The headers of safetensors files: read without tensor data, and compared with the network"""

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hunyuan_vllm.layout import CheckpointError, Layout, Shape
from hunyuan_vllm.util.text import some

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
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
    """A file, its tensors in the order of their bytes, and its `fault`, "" if there is none.

    A shard with a fault has the tensors of its header, if that could be read.
    """

    file: Path
    size: int
    tensors: tuple[StoredTensor, ...]
    fault: str = ""


def read_shards(files: Sequence[Path]) -> list[Shard]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(_read, files))


def _read(path: Path) -> Shard:
    size = 0
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start + file.read(len(LFS_POINTER) - 8) == LFS_POINTER:
                return Shard(path, size, (), "is a Git LFS pointer instead of the file")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
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


Used = dict[StoredTensor, tuple[str, ...]]  # stored tensor → the canonical tensors it holds


class HeaderFault(NamedTuple):
    """What is wrong with one tensor: `name` is the stored one's, or where `tensor` is None the canonical one's."""

    kind: Literal["unknown", "types", "shapes", "twice", "missing"]
    name: str
    message: str
    tensor: StoredTensor | None = None


def header_faults(tensors: Sequence[StoredTensor], layout: Layout, used: Used) -> Iterator[HeaderFault]:
    """Everything in which a checkpoint's tensors differ from the network's: the engine raises the first, `check` lists
    all. `used` is filled with the tensors that the network uses."""
    places: dict[str, Path] = {}
    for tensor in tensors:
        name, dtype = tensor.name, tensor.dtype
        try:
            parts = layout.parts(name)
        except CheckpointError as error:
            yield HeaderFault("unknown", name, str(error), tensor)
            continue
        if not parts:
            continue
        used[tensor] = parts
        if dtype not in (allowed := layout.types(parts[0])):
            message = (
                f"checkpoint tensor {name!r} is {dtype} where config.json promises {' or '.join(allowed)}: copy the "
                "config.json that belongs to the checkpoint, or correct its quantization_config"
            )
            yield HeaderFault("types", name, message, tensor)
        try:
            layout.names(name, tensor.shape)
        except CheckpointError as error:
            yield HeaderFault("shapes", name, str(error), tensor)
        for part in parts:
            if part in places:
                message = f"checkpoint tensor {part!r} is in {places[part]} and again in {tensor.file}"
                yield HeaderFault("twice", part, message)
            places[part] = tensor.file
    if missing := layout.missing(places):
        folder = f"{tensors[0].file.parent}" if tensors else "the checkpoint"
        message = f"{folder} lacks checkpoint tensor {some([repr(name) for name in missing])}"
        yield from (HeaderFault("missing", name, message) for name in missing)
