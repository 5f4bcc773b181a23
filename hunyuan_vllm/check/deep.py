"""Every byte of a checkpoint read: digests, and values that are not finite"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hunyuan_vllm.check.files import SUMS_FILE, Digest, Shard, StoredTensor, known_digests, plain_files, write_sums
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.text import some

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


AGAIN = "download their shards again"
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")  # rows of padding may be zeros


@dataclass
class Deep:
    """What to read.

    Args:
        shards: with sound headers.
        used: the tensors that the network uses; only their values are judged.
        write_sums: write SHA256SUMS if nothing is wrong.
        jobs: files read at a time.

    Raises:
        UserError: SHA256SUMS cannot be read or written.
    """

    folder: Path
    shards: Sequence[Shard]
    used: Mapping[StoredTensor, object]
    write_sums: bool
    jobs: int

    def __post_init__(self) -> None:
        try:
            self.known = known_digests(self.folder)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
        scanned = {shard.file: tuple(filter(self.used.__contains__, shard.tensors)) for shard in self.shards}
        files = [path for path in plain_files(self.folder) if self.write_sums or path.name in self.known]
        # The largest first, so that no thread is left alone with one at the end.
        self.files = sorted({*scanned, *files}, key=lambda path: (-path.stat().st_size, path.name))
        self._scanned = scanned

    @property
    def total(self) -> int:
        """Bytes to be read."""
        return sum(path.stat().st_size for path in self.files)

    def run(self, advance: Callable[[int], None], section: Section) -> None:
        """Read everything; `advance` is told of bytes, from several threads."""
        stop = threading.Event()
        contents: list[Content] = []
        pool = ThreadPoolExecutor(self.jobs)
        try:
            for content in pool.map(lambda path: self._read(path, advance, stop), self.files):
                if isinstance(content, Content):
                    contents.append(content)
                else:
                    path, error = content
                    text = f"it cannot be read to its end: {error.strerror or error}"
                    section.problem(path.name, text, "look at the disk (dmesg), then download the file again")
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        self._report_digests(contents, section)
        self._report_values(contents, section)
        if self.write_sums:
            self._write(contents, section)

    def _read(
        self, path: Path, advance: Callable[[int], None], stop: threading.Event
    ) -> Content | tuple[Path, OSError]:
        def advance_unless_stopped(size: int) -> None:
            if stop.is_set():
                raise Interrupted
            advance(size)

        known = self.known.get(path.name)
        hashers = [known.hasher(path.stat().st_size)] if known else []
        if self.write_sums:
            hashers.append(hashlib.sha256())
        try:
            return read_through(path, self._scanned.get(path, ()), hashers, advance_unless_stopped)
        except OSError as error:
            return path, error

    def _report_digests(self, contents: Sequence[Content], section: Section) -> None:
        compared: list[tuple[str, Digest]] = []
        wrong: list[str] = []
        for content in contents:
            if known := self.known.get(content.file.name):
                compared.append((content.file.name, known))
                if content.digests[0] != known.value:
                    wrong.append(content.file.name)
        listed = [name for name, known in self.known.items() if known.source == SUMS_FILE]
        absent = [name for name in listed if not (self.folder / name).exists()]
        if wrong:
            text = (
                f"{len(wrong)} of {len(compared)} files are not what {self.known[wrong[0]].source} has: {some(wrong)}"
            )
            section.problem("hashes", text, "download them again", wrong)
        if absent:
            section.problem("hashes", f"{SUMS_FILE} lists what is not here: {some(absent)}", "download it", absent)
        if compared and not wrong:
            sources = sorted({known.source for _, known in compared})
            section.ok("hashes", f"{len(compared)} files are as {' and '.join(sources)} has them")
        if unlisted := [path.name for path in plain_files(self.folder) if path.name not in self.known]:
            if compared:
                section.ok("hashes", f"nothing to compare {len(unlisted)} with: {some(unlisted)}")
            elif not self.write_sums:
                why = f"nothing to compare with: neither {SUMS_FILE} nor the notes of the hub's client are here"
                section.skipped("hashes", why, "--write-sums writes it, for the next time or for a copy elsewhere")

    def _report_values(self, contents: Sequence[Content], section: Section) -> None:
        not_finite = {tensor: count for content in contents for tensor, count in content.not_finite.items()}
        zero = {tensor: size for content in contents for tensor, size in content.zero.items()}
        if not_finite:
            listed = [f"{tensor.name} ({count:,} of {tensor.elements:,})" for tensor, count in not_finite.items()]
            text = f"{len(listed):,} tensors hold NaN or infinity"
            section.problem("values", text, f"{AGAIN}; if they stay, the checkpoint is broken", listed)
        all_zero = [tensor.name for tensor, size in zero.items() if size == tensor.nbytes]
        if empty := [name for name in all_zero if not name.endswith(".bias")]:
            text = f"{len(empty):,} tensors are all zeros"
            section.problem("values", text, f"{AGAIN}: their space was reserved and not filled", empty)
        holes = [
            f"{tensor.name} ({size >> 20} MiB)"
            for tensor, size in zero.items()
            if CHUNK <= size < tensor.nbytes and tensor.name not in EMBEDDINGS
        ]
        if holes:
            text = f"{len(holes):,} tensors have stretches of nothing but zeros, as an unfinished download leaves them"
            section.problem("values", text, AGAIN, holes)
        if not (not_finite or empty or holes):
            section.ok("values", f"no NaN, no infinity, no hole in {len(self.used):,} tensors")

    def _write(self, contents: Sequence[Content], section: Section) -> None:
        if not section.sound:
            why = f"{SUMS_FILE} is not written: it would vouch for what is wrong above"
            section.skipped("hashes", why, "mend that, then run this again")
            return
        path = write_sums(self.folder, {content.file.name: content.digests[-1] for content in contents})
        section.ok("hashes", f"written to {path}; sha256sum --check {SUMS_FILE} reads it too")
