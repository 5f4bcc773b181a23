"""Every byte of a file, once: its hash, and whether its tensors' values are numbers and are there at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hunyuan_vllm.check.shards import StoredTensor

__all__ = ["CHUNK", "Content", "Interrupted", "read_through"]

CHUNK = 1 << 20  # small enough for its hash and its scan to find it in the processor's cache
# Type → (integers of its width, the bits without the sign, those of infinity). As an integer, a float without its sign
# grows with its magnitude, so one maximum finds NaN and infinity, and zeros.
BITS: dict[str, tuple[type[np.unsignedinteger], int, int]] = {
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F64": (np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
    "F8_E5M2": (np.uint8, 0x7F, 0x7C),
}
INTEGER = (np.uint8, 0xFF, 0x100)


class Interrupted(Exception):
    """The run is to end before the file does."""


@dataclass
class Content:
    """What a file holds.

    Attributes:
        digests: hash in hexadecimal, in the order of the hashers asked for.
        not_finite: tensor → how many of its values are NaN or infinite.
        zero: tensor → bytes of it that are in a chunk of nothing but zeros.
    """

    file: Path
    digests: list[str] = field(default_factory=list)
    not_finite: dict[StoredTensor, int] = field(default_factory=dict)
    zero: dict[StoredTensor, int] = field(default_factory=dict)


def read_through(
    file: Path,
    tensors: tuple[StoredTensor, ...],
    hashers: list[hashlib._Hash],
    advance: Callable[[int], None],
) -> Content:
    """Read `file` to its end.

    Args:
        tensors: those to look at, in the order of their bytes, without overlaps.
        advance: told how many bytes have been read since last time; raises `Interrupted` to end.

    Raises:
        OSError: the disk gave out, or the file has become shorter.
    """
    content = Content(file)
    with file.open("rb") as source:
        position = 0
        for tensor in tensors:
            for chunk in _chunks(source, position, tensor.start, hashers, advance):
                del chunk  # what lies between tensors is hashed only
            for chunk in _chunks(source, tensor.start, tensor.start + tensor.nbytes, hashers, advance):
                _look(chunk, tensor, content)
            position = tensor.start + tensor.nbytes
        for chunk in _chunks(source, position, file.stat().st_size, hashers, advance):
            del chunk
    content.digests = [hasher.hexdigest() for hasher in hashers]
    return content


def _chunks(
    source: BinaryIO, start: int, end: int, hashers: list[hashlib._Hash], advance: Callable[[int], None]
) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(CHUNK, max(end - start, 0))))
    while start < end:
        size = source.readinto(buffer[: end - start])  # type: ignore[attr-defined]
        if not size:
            raise OSError("the file ends early")
        for hasher in hashers:
            hasher.update(buffer[:size])
        yield buffer[:size]
        start += size
        advance(size)


def _look(chunk: memoryview, tensor: StoredTensor, content: Content) -> None:
    width, without_sign, infinity = BITS.get(tensor.dtype, INTEGER)
    magnitudes = np.frombuffer(chunk, width) & width(without_sign)
    most = int(magnitudes.max())
    if most >= infinity:
        count = int(np.count_nonzero(magnitudes >= width(infinity)))
        content.not_finite[tensor] = content.not_finite.get(tensor, 0) + count
    elif most == 0:
        content.zero[tensor] = content.zero.get(tensor, 0) + len(chunk)
