"""Every byte of a checkpoint: hashes, and values that are not finite"""

import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from hunyuan_vllm.check.files import SUMS_FILE, plain_files
from hunyuan_vllm.checkpoint import Shard, StoredTensor
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import replacing
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.text import plural, some

SUMS_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
NOTES = (".cache/huggingface/download", ".huggingface/download")


class Digest(NamedTuple):
    """A hash in hexadecimal and its source. 64 digits are SHA-256; 40 are Git's, which the hub uses for small files."""

    value: str
    source: str


def known_digests(folder: Path) -> dict[str, Digest]:
    """File name → hash; SHA256SUMS takes precedence. Raises OSError if it cannot be read."""
    given: list[tuple[str, str, str]] = []  # name, hash, source
    for path in plain_files(folder):
        if path.is_symlink() and path.resolve().parent.name == "blobs":
            given.append((path.name, path.resolve().name, "the hub's cache"))
    for notes in NOTES:
        for path in (folder / notes).glob("*.metadata"):
            lines = path.read_text(errors="replace").splitlines()
            value = lines[1] if len(lines) > 1 else ""
            given.append((path.name.removesuffix(".metadata"), value, "the hub's download"))
    if (folder / SUMS_FILE).exists():
        for line in (folder / SUMS_FILE).read_text(errors="replace").splitlines():
            if match := SUMS_LINE.fullmatch(line.strip()):
                given.append((match[2], match[1], SUMS_FILE))
    stripped = ((name, value.strip().strip('"').lower(), source) for name, value, source in given)
    return {name: Digest(value, source) for name, value, source in stripped if DIGEST.fullmatch(value)}


CHUNK = 1 << 20  # stays in the processor's cache between its hash and its scan
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
    """The run has been stopped."""


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
    hashers: "list[hashlib._Hash]",
    advance: Callable[[int], None],
) -> Content:
    """Read `file` to its end.

    Args:
        tensors: those to scan, in the order of their bytes, without overlaps.
        advance: is told how many bytes have been read since its last call; raises `Interrupted` to stop.
    """
    content = Content(file)
    with file.open("rb") as source:
        position = 0
        for tensor in tensors:
            for chunk in _chunks(source, position, tensor.start, hashers, advance):
                del chunk  # what lies between tensors is hashed only
            for chunk in _chunks(source, tensor.start, tensor.start + tensor.nbytes, hashers, advance):
                _scan(chunk, tensor, content)
            position = tensor.start + tensor.nbytes
        for chunk in _chunks(source, position, file.stat().st_size, hashers, advance):
            del chunk
    content.digests = [hasher.hexdigest() for hasher in hashers]
    return content


def _chunks(
    source: BinaryIO, start: int, end: int, hashers: "list[hashlib._Hash]", advance: Callable[[int], None]
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


def _scan(chunk: memoryview, tensor: StoredTensor, content: Content) -> None:
    width, without_sign, infinity = BITS.get(tensor.dtype, INTEGER)
    magnitudes = np.frombuffer(chunk, width) & width(without_sign)
    largest = int(magnitudes.max())
    if largest >= infinity:
        count = int(np.count_nonzero(magnitudes >= width(infinity)))
        content.not_finite[tensor] = content.not_finite.get(tensor, 0) + count
    elif largest == 0:
        content.zero[tensor] = content.zero.get(tensor, 0) + len(chunk)


AGAIN = "download their shards again"
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")  # rows of padding may be zeros


@dataclass
class Deep:
    """A check of every byte.

    Args:
        used: the tensors that the network uses; only their values are checked.
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
        self._scanned = {shard.file: tuple(filter(self.used.__contains__, shard.tensors)) for shard in self.shards}
        files = [path for path in plain_files(self.folder) if self.write_sums or path.name in self.known]
        # The largest first, so that the last thread does not run alone for long.
        self.files = sorted({*self._scanned, *files}, key=lambda path: (-path.stat().st_size, path.name))

    @property
    def total(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def run(self, advance: Callable[[int], None], section: Section) -> None:
        """Read everything; `advance` is called from several threads."""
        stop = threading.Event()
        contents: list[Content] = []
        pool = ThreadPoolExecutor(self.jobs)
        try:
            for content in pool.map(lambda path: self._read(path, advance, stop), self.files):
                if isinstance(content, Content):
                    contents.append(content)
                else:
                    path, error = content
                    text = f"it cannot be read completely: {error.strerror or error}"
                    section.problem(path.name, text, "check the disk (dmesg), then download the file again")
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
        hashers: list[hashlib._Hash] = []
        if known and len(known.value) == 40:  # Git's
            hashers.append(hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))
        elif known:
            hashers.append(hashlib.sha256())
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
            source = self.known[wrong[0]].source
            text = f"{len(wrong)} of {plural(len(compared), 'file')} differ from {source}: {some(wrong)}"
            section.problem("hashes", text, "download them again", wrong)
        if absent:
            section.problem("hashes", f"{SUMS_FILE} lists missing files: {some(absent)}", "download them", absent)
        if compared and not wrong:
            sources = sorted({known.source for _, known in compared})
            section.ok("hashes", f"{plural(len(compared), 'file')} as in {' and '.join(sources)}")
        if unlisted := [path.name for path in plain_files(self.folder) if path.name not in self.known]:
            if compared:
                section.ok("hashes", f"no known hash for {plural(len(unlisted), 'file')}: {some(unlisted)}")
            elif not self.write_sums:
                why = f"nothing to compare with: there is neither {SUMS_FILE} nor metadata of the hub's client"
                section.skipped("hashes", why, f"--write-sums writes {SUMS_FILE} for the next check, or for a copy")

    def _report_values(self, contents: Sequence[Content], section: Section) -> None:
        not_finite = {tensor: count for content in contents for tensor, count in content.not_finite.items()}
        zero = {tensor: size for content in contents for tensor, size in content.zero.items()}
        if not_finite:
            listed = [f"{tensor.name} ({count:,} of {tensor.elements:,})" for tensor, count in not_finite.items()]
            text = f"{plural(len(listed), 'tensor')} with NaN or infinity"
            section.problem("values", text, f"{AGAIN}; if they remain, the checkpoint is broken", listed)
        all_zero = [tensor.name for tensor, size in zero.items() if size == tensor.nbytes]
        if empty := [name for name in all_zero if not name.endswith(".bias")]:
            text = f"{plural(len(empty), 'tensor')} of zeros only"
            section.problem("values", text, f"{AGAIN}: their space was reserved but not filled", empty)
        holes = [
            f"{tensor.name} ({size >> 20} MiB)"
            for tensor, size in zero.items()
            if CHUNK <= size < tensor.nbytes and tensor.name not in EMBEDDINGS
        ]
        if holes:
            text = f"{plural(len(holes), 'tensor')} with long runs of zeros, as in an unfinished download"
            section.problem("values", text, AGAIN, holes)
        if not (not_finite or empty or holes):
            section.ok("values", f"no NaN, infinity or long run of zeros in {plural(len(self.used), 'tensor')}")

    def _write(self, contents: Sequence[Content], section: Section) -> None:
        if not section.sound:
            why = f"{SUMS_FILE} is not written because of the problems above"
            section.skipped("hashes", why, "fix them, then run this again")
            return
        sums = {content.file.name: content.digests[-1] for content in contents}
        path = self.folder / SUMS_FILE
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
        section.ok("hashes", f"written to {path}; sha256sum --check {SUMS_FILE} reads it too")
