"""A file of conversations as a dataset, and the report of `hunyuan-vllm data check`"""

from __future__ import annotations

import logging
import math
import os
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

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
        max_seq_length: tokens beyond it are cut off; None for no limit.
    """

    tokenizer: Any
    max_seq_length: int | None = None
    train_on_all: bool = False
    default_system: str = DEFAULT_SYSTEM

    def __call__(self, line: Line) -> Example:
        """The conversation in a line, uncut."""
        conversation = parse_conversation(line)
        return encode(conversation, self.tokenizer, train_on_all=self.train_on_all, default_system=self.default_system)

    def cut(self, example: Example) -> Example:
        """`example` as far as `max_seq_length` goes."""
        return example if self.max_seq_length is None else example.cut(self.max_seq_length)


@dataclass(frozen=True)
class BadLine:
    number: int
    cause: str


@dataclass
class Scan:
    """What a file holds, in 24 bytes a conversation.

    Attributes:
        numbers: line numbers of the conversations, counted from 1.
        offsets: where each begins, in bytes.
        lengths: tokens of each, uncut.
        learned: learned tokens of each, after cutting; conversations with 0 are skipped.
        bad: the first bad lines, up to `MAX_BAD`.
    """

    max_seq_length: int | None
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
        limit = self.max_seq_length
        return 0 if limit is None else sum(length > limit for length in self.lengths)

    @property
    def without_answer(self) -> int:
        """Conversations of which cutting leaves nothing to learn."""
        return sum(count == 0 for count in self.learned)

    def add(self, found: _Found) -> None:
        """Add a line's result."""
        if isinstance(found, BadLine):
            self.bad_count += 1
            if len(self.bad) < MAX_BAD:
                self.bad.append(found)
            return
        form, *values = found
        self.forms[form] += 1
        for column, value in zip((self.numbers, self.offsets, self.lengths, self.learned), values, strict=True):
            column.append(value)


_Raw = tuple[int, int, bytes]  # number, offset, line
_Found = BadLine | tuple[str, int, int, int, int]  # form, number, offset, length, learned


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
    """
    result = Scan(encoding.max_seq_length)
    try:
        refuse_other_encodings(path)
        if processes is None:
            processes = _cores() if path.stat().st_size >= LARGE else 1
        for size, found in _results(path, encoding, processes):
            for one in found:
                result.add(one)
            advance(size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not len(result) and not result.bad_count:
        raise UserError(f"{path} is empty: it needs one conversation per line")
    return result


def _cores() -> int:
    """Those of this machine, divided among the ranks that torchrun has started on it."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _results(path: Path, encoding: Encoding, processes: int) -> Iterator[tuple[int, list[_Found]]]:
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


def _encode_chunk(chunk: Iterable[_Raw], encoding: Encoding | None = None) -> tuple[int, list[_Found]]:
    encoding = encoding or _encoding
    size = 0
    found: list[_Found] = []
    for number, offset, raw in chunk:
        size += len(raw)
        line = parse_line(number, raw)
        if line is None:
            continue
        try:
            example = encoding(line)
        except BadConversation as error:
            found.append(BadLine(number, str(error)))
            continue
        found.append((form_of(line.given), number, offset, len(example), encoding.cut(example).learned))
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

    def __init__(
        self,
        path: Path,
        encoding: Encoding,
        *,
        processes: int | None = None,
        advance: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._path, self._encoding = path, encoding
        self._stamp = _stamp(path)
        self.scan = scan(path, encoding, processes=processes, advance=advance)
        found, limit = self.scan, encoding.max_seq_length
        if found.bad_count:
            shown = "; ".join(f"line {bad.number}: {bad.cause}" for bad in found.bad[:SHOWN])
            more = f"; and {found.bad_count - SHOWN} more" if found.bad_count > SHOWN else ""
            raise UserError(f"{path}: {shown}{more} (hunyuan-vllm data check {path} lists them all)")
        self._kept = array("Q", (index for index, learned in enumerate(self.scan.learned) if learned))
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
        place = self._kept[index]
        with self._path.open("rb") as file:
            file.seek(self.scan.offsets[place])
            raw = file.readline()
        if _stamp(self._path) != self._stamp:
            raise UserError(f"{self._path} changed during training: start again")
        line = parse_line(self.scan.numbers[place], raw)
        assert line is not None, raw
        return self._encoding.cut(self._encoding(line))

    @property
    def lengths(self) -> array[int]:
        """Tokens of each conversation, after cutting."""
        limit = self._encoding.max_seq_length or 2**32 - 1
        return array("I", (min(self.scan.lengths[place], limit) for place in self._kept))


class PackedDataset:
    """Rows of several conversations that together have at most `max_seq_length` tokens, for `PackingCollator`.

    Conversations are shuffled by `seed`, and each is put into the fullest open row that has room for it.
    """

    OPEN = 64  # rows filled at a time: enough to leave little room, few enough to mix lengths

    def __init__(self, dataset: ConversationDataset, max_seq_length: int, seed: int = 0) -> None:
        self._dataset = dataset
        lengths = dataset.lengths
        self._rows = _packed(lengths, max_seq_length, seed, self.OPEN)
        self.filled = sum(lengths) / (len(self._rows) * max_seq_length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[Example]:
        return [self._dataset[place] for place in self._rows[index]]


def _packed(lengths: Sequence[int], room: int, seed: int, open_rows: int) -> list[list[int]]:
    if max(lengths) > room:
        raise ValueError(f"a conversation of {max(lengths)} tokens does not fit a row of {room}")
    order = list(range(len(lengths)))
    Random(seed).shuffle(order)
    done: list[list[int]] = []
    filling: list[tuple[int, list[int]]] = []  # tokens that still fit, and what is in the row
    for place in order:
        length = lengths[place]
        fitting = [index for index, (left, _) in enumerate(filling) if left >= length]
        if fitting:
            best = min(fitting, key=lambda index: filling[index][0])
            left, row = filling[best]
            row.append(place)
            filling[best] = (left - length, row)
            continue
        if len(filling) == open_rows:
            fullest = min(range(open_rows), key=lambda index: filling[index][0])
            done.append(filling.pop(fullest)[1])
        filling.append((room - length, [place]))
    return done + [row for _, row in filling]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return state.st_size, state.st_mtime_ns


PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Sample:
    """One conversation as it is trained on.

    Attributes:
        parts: its text in runs: (text, whether its tokens are learned).
    """

    line: int
    example: Example
    parts: list[tuple[str, bool]]


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Shortest, quantiles (the nearest length from above) and longest of `lengths`, which are not empty."""
    ordered = sorted(lengths)
    found = {f"p{percent}": ordered[math.ceil(percent / 100 * len(ordered)) - 1] for percent in PERCENTILES}
    return {"shortest": ordered[0], **found, "longest": ordered[-1]}


def read_sample(path: Path, found: Scan, encoding: Encoding, line: int | None = None) -> Sample | None:
    """The conversation of line `line`, or the first one that can be trained on; None where there is none."""
    if line is None:
        place = next((place for place, learned in enumerate(found.learned) if learned), None)
        if place is None:
            return None
    else:
        try:
            place = found.numbers.index(line)
        except ValueError:
            raise UserError(f"--sample {line}: no conversation is in that line of {path}") from None
    with path.open("rb") as file:
        file.seek(found.offsets[place])
        read = parse_line(found.numbers[place], file.readline())
    assert read is not None
    example = encoding.cut(encoding(read))
    return Sample(found.numbers[place], example, list(_runs(example, encoding.tokenizer)))


def _runs(example: Example, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    marked = zip(example.input_ids, (label != IGNORED for label in example.labels), strict=True)
    for learned, run in groupby(marked, key=lambda pair: pair[1]):
        yield tokenizer.decode([token for token, _ in run]), learned


def check_report(path: Path, found: Scan, sample: Sample | None) -> dict[str, Any]:
    limit = found.max_seq_length
    return {
        "file": str(path),
        "conversations": len(found),
        "forms": dict(found.forms.most_common()),
        "bad_lines": found.bad_count,
        "bad": [{"line": bad.number, "cause": bad.cause} for bad in found.bad],
        "max_seq_length": limit,
        "tokens": sum(found.lengths),
        "tokens_after_truncation": sum(min(length, limit or length) for length in found.lengths),
        "learned_tokens": sum(found.learned),
        "lengths": percentiles(found.lengths) if len(found) else None,
        "truncated": found.truncated,
        "without_answer": found.without_answer,
        "sample": sample
        and {
            "line": sample.line,
            "tokens": len(sample.example),
            "truncated": sample.example.truncated,
            "parts": [{"text": text, "learned": learned} for text, learned in sample.parts],
        },
    }
