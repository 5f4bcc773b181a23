"""A file of conversations as a dataset, and the report of `hunyuan-vllm data check`"""

from __future__ import annotations

import logging
import math
import os
from array import array
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from hunyuan_vllm.train.messages import DEFAULT_SYSTEM, BadConversation, form_of, parse_conversation
from hunyuan_vllm.train.tokens import IGNORED, Example, encode
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.jsonl import Line, parse_line, refuse_other_encodings

CHUNK = 256  # lines that a process is given at a time
LARGE = 8 << 20  # bytes of a file from which several processes read it
MAX_BAD = 1000  # bad lines that are reported


@dataclass(frozen=True)
class Encoding:
    """How a line becomes token ids. Picklable.

    Args:
        max_seq_length: tokens beyond it are cut off.
    """

    tokenizer: Any
    max_seq_length: int = 2**32 - 1
    train_on_all: bool = False
    default_system: str = DEFAULT_SYSTEM

    def __call__(self, line: Line) -> Example:
        """The conversation in a line, uncut."""
        conversation = parse_conversation(line)
        return encode(conversation, self.tokenizer, train_on_all=self.train_on_all, default_system=self.default_system)


class BadLine(NamedTuple):
    line: int
    cause: str


class GoodLine(NamedTuple):
    """A conversation: its offset in bytes, its tokens uncut, and its learned tokens after cutting."""

    form: str
    number: int
    offset: int
    length: int
    learned: int


@dataclass
class Scan:
    """What a file holds, in 24 bytes a conversation. The arrays are `GoodLine`'s fields; conversations with no learned
    token are skipped.

    Attributes:
        bad: the first bad lines, up to `MAX_BAD`.
    """

    max_seq_length: int
    numbers: array[int] = field(default_factory=lambda: array("Q"))
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    lengths: array[int] = field(default_factory=lambda: array("I"))
    learned: array[int] = field(default_factory=lambda: array("I"))
    forms: Counter[str] = field(default_factory=Counter)
    bad: list[BadLine] = field(default_factory=list)
    bad_count: int = 0

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def truncated(self) -> int:
        """Conversations longer than `max_seq_length`."""
        return sum(length > self.max_seq_length for length in self.lengths)

    @property
    def without_answer(self) -> int:
        """Conversations of which cutting leaves nothing to learn."""
        return sum(count == 0 for count in self.learned)

    def add(self, line: GoodLine | BadLine) -> None:
        if isinstance(line, BadLine):
            self.bad_count += 1
            if len(self.bad) < MAX_BAD:
                self.bad.append(line)
            return
        self.forms[line.form] += 1
        self.numbers.append(line.number)
        self.offsets.append(line.offset)
        self.lengths.append(line.length)
        self.learned.append(line.learned)

    def read(self, path: Path, place: int) -> Line:
        """The line of a conversation, again."""
        with path.open("rb") as file:
            file.seek(self.offsets[place])
            line = parse_line(self.numbers[place], file.readline())
        assert line is not None
        return line


def scan(
    path: Path,
    encoding: Encoding,
    *,
    processes: int | None = None,
    advance: Callable[[int], object] = lambda size: None,
) -> Scan:
    """Read and encode the whole file once.

    Args:
        processes: default: one for a small file, else this rank's share of the cores.
        advance: is told the bytes read since its last call.
    """
    result = Scan(encoding.max_seq_length)
    try:
        refuse_other_encodings(path)
        if processes is None:
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # that torchrun has started on this machine
            processes = max(1, len(os.sched_getaffinity(0)) // ranks) if path.stat().st_size >= LARGE else 1
        for size, found in _results(path, encoding, processes):
            for line in found:
                result.add(line)
            advance(size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not len(result) and not result.bad_count:
        raise UserError(f"{path} is empty: it needs one conversation per line")
    return result


_Raw = tuple[int, int, bytes]  # number, offset, line
_Found = tuple[int, list[GoodLine | BadLine]]  # bytes, lines


def _results(path: Path, encoding: Encoding, processes: int) -> Iterator[_Found]:
    """Results of `_encode_chunk` in the file's order, with a few chunks in memory."""
    chunks = _chunks(path)
    if processes == 1:
        yield from (_encode_chunk(chunk, encoding) for chunk in chunks)
        return
    # Forked, like the workers of torch's DataLoader: modules and tokenizer are already loaded.
    with ProcessPoolExecutor(processes, get_context("fork"), initializer=_set_encoding, initargs=(encoding,)) as pool:
        waiting = deque(pool.submit(_encode_chunk, chunk) for chunk in islice(chunks, 2 * processes))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_encode_chunk, chunk) for chunk in islice(chunks, 1))


_encoding: Encoding
"""Set in each process of the pool."""


def _set_encoding(encoding: Encoding) -> None:
    global _encoding
    _encoding = encoding


def _encode_chunk(chunk: Iterable[_Raw], encoding: Encoding | None = None) -> _Found:
    encoding = encoding or _encoding
    size = 0
    found: list[GoodLine | BadLine] = []
    for number, offset, raw in chunk:
        size += len(raw)
        if (line := parse_line(number, raw)) is None:
            continue
        try:
            example = encoding(line)
        except BadConversation as error:
            found.append(BadLine(number, str(error)))
        else:
            learned = example.cut(encoding.max_seq_length).learned
            found.append(GoodLine(form_of(line.given), number, offset, len(example), learned))
    return size, found


def _chunks(path: Path) -> Iterator[list[_Raw]]:
    offset = 0
    with path.open("rb") as file:
        numbered = enumerate(file, start=1)
        while lines := list(islice(numbered, CHUNK)):
            chunk = []
            for number, raw in lines:
                chunk.append((number, offset, raw))
                offset += len(raw)
            yield chunk


SHOWN = 5  # bad lines in a message

logger = logging.getLogger(__name__)


class ConversationDataset:
    """The conversations of a file that have learned tokens, in the file's order; 24 bytes each in memory.

    Conversations longer than `max_seq_length` are cut, and those left without an answer are skipped; both are logged.
    """

    def __init__(self, path: Path, encoding: Encoding) -> None:
        self._path, self._encoding = path, encoding
        self._stamp, limit = self._state(), encoding.max_seq_length
        self.scan = found = scan(path, encoding)
        if found.bad_count:
            shown = "; ".join(f"line {bad.line}: {bad.cause}" for bad in found.bad[:SHOWN])
            more = f"; and {found.bad_count - SHOWN} more" if found.bad_count > SHOWN else ""
            raise UserError(f"{path}: {shown}{more} (hunyuan-vllm data check {path} lists them all)")
        self._kept = array("Q", (index for index, learned in enumerate(found.learned) if learned))
        if found.truncated:
            logger.warning(f"{path}: {found.truncated} of {len(found)} conversations are cut at {limit} tokens")
        if found.without_answer:
            skipped = f"{found.without_answer} are skipped, since cutting leaves no answer to learn"
            logger.warning(f"{path}: {skipped}")
        if not self._kept:
            raise UserError(f"{path}: no conversation has an answer within --max_seq_length {limit}: raise it")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        if self._state() != self._stamp:
            raise UserError(f"{self._path} changed during training: start again")
        example = self._encoding(self.scan.read(self._path, self._kept[index]))
        return example.cut(self._encoding.max_seq_length)

    @property
    def lengths(self) -> array[int]:
        """Tokens of each conversation, after cutting."""
        limit = self._encoding.max_seq_length
        return array("I", (min(self.scan.lengths[place], limit) for place in self._kept))

    def _state(self) -> tuple[int, int]:
        try:
            state = self._path.stat()
        except OSError as error:
            raise UserError(f"{self._path} cannot be read: {error.strerror}") from None
        return state.st_size, state.st_mtime_ns


OPEN_ROWS = 64  # filled at a time: enough to leave little room, few enough to mix lengths


class PackedDataset:
    """Rows of several conversations that together have at most the data set's `max_seq_length` tokens.

    Conversations are shuffled by `seed`, and each is put into the fullest open row that has room for it.
    """

    def __init__(self, dataset: ConversationDataset, seed: int = 0) -> None:
        self._dataset = dataset
        lengths, room = dataset.lengths, dataset.scan.max_seq_length
        self._rows = _packed(lengths, room, seed)
        self.filled = sum(lengths) / (len(self._rows) * room)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[Example]:
        return [self._dataset[place] for place in self._rows[index]]


def _packed(lengths: Sequence[int], room: int, seed: int) -> list[list[int]]:
    order = list(range(len(lengths)))
    Random(seed).shuffle(order)
    done: list[list[int]] = []
    filling: list[tuple[int, list[int]]] = []  # tokens that still fit, and what is in the row; the fullest first
    for place in order:
        length = lengths[place]
        best = next((index for index, (left, _) in enumerate(filling) if left >= length), None)
        left, row = (room, []) if best is None else filling.pop(best)
        row.append(place)
        if len(filling) == OPEN_ROWS:
            done.append(filling.pop(0)[1])
        insort(filling, (left - length, row))
    return done + [row for _, row in filling]


PERCENTILES = (50, 90, 95, 99)


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Shortest, quantiles (the nearest length from above) and longest of `lengths`, which are not empty."""
    ordered = sorted(lengths)
    found = {f"p{percent}": ordered[math.ceil(percent / 100 * len(ordered)) - 1] for percent in PERCENTILES}
    return {"shortest": ordered[0], **found, "longest": ordered[-1]}


def check_report(path: Path, found: Scan, encoding: Encoding, line: int | None = None) -> dict[str, Any]:
    """What `data check` reports, with the conversation of line `line`, or of the first that can be trained on, as it is
    trained on: its text in runs, and whether each is learned."""
    limit = found.max_seq_length
    return {
        "file": str(path),
        "conversations": len(found),
        "forms": dict(found.forms.most_common()),
        "bad_lines": found.bad_count,
        "bad": [bad._asdict() for bad in found.bad],
        "max_seq_length": limit,
        "tokens": sum(found.lengths),
        "tokens_after_truncation": sum(min(length, limit) for length in found.lengths),
        "learned_tokens": sum(found.learned),
        "lengths": percentiles(found.lengths) if len(found) else None,
        "truncated": found.truncated,
        "without_answer": found.without_answer,
        "sample": _sample(path, found, encoding, line),
    }


def _sample(path: Path, found: Scan, encoding: Encoding, line: int | None) -> dict[str, Any] | None:
    if line is not None and line not in found.numbers:
        raise UserError(f"--sample {line}: no conversation is in that line of {path}")
    if line is not None:
        place = found.numbers.index(line)
    elif any(found.learned):
        place = next(place for place, learned in enumerate(found.learned) if learned)
    else:
        return None
    example = encoding(found.read(path, place)).cut(encoding.max_seq_length)
    marked = zip(example.input_ids, (label != IGNORED for label in example.labels), strict=True)
    runs = groupby(marked, key=lambda token: token[1])
    decode = encoding.tokenizer.decode
    return {
        "line": found.numbers[place],
        "tokens": len(example),
        "learned_tokens": example.learned,
        "truncated": example.truncated,
        "parts": [{"text": decode([id for id, _ in run]), "learned": learned} for learned, run in runs],
    }
