"""A file of conversations as a dataset: looked through once, then read and encoded line by line as it is needed."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch

from hunyuan_vllm.batch.lines import parse
from hunyuan_vllm.errors import UserError
from hunyuan_vllm.train.scan import Encoding, Scan, scan
from hunyuan_vllm.train.tokens import Example

__all__ = ["ConversationDataset", "PackedDataset"]

SHOWN = 5  # bad lines in a message

logger = logging.getLogger(__name__)


class ConversationDataset(torch.utils.data.Dataset[Example]):
    """The conversations of a file that have something to learn, in its order; 24 bytes each in memory.

    The order of training is left to the sampler. Conversations longer than `max_seq_length` are cut, and those of which
    no answer is left are skipped; the log says how many of each.

    Args:
        path: a JSONL file (see messages.py).
        encoding: how its lines become token ids.
        processes, advance: as `scan` takes them.

    Attributes:
        scan: what the file holds.

    Raises:
        UserError: it cannot be read, a line is of no use, or nothing is left to train on; the message names the lines.
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
        _refuse_bad_lines(path, self.scan)
        self._kept = array("Q", (index for index, learned in enumerate(self.scan.learned) if learned))
        for warning in _warnings(path, self.scan):
            logger.warning(warning)
        if not self._kept:
            raise UserError(
                f"{path}: of no conversation is an answer left at --max_seq_length {encoding.max_seq_length}: raise it"
            )

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        place = self._kept[index]
        with self._path.open("rb") as file:
            file.seek(self.scan.offsets[place])
            raw = file.readline()
        if _stamp(self._path) != self._stamp:
            raise UserError(f"{self._path} has been changed while it was trained on: start again")
        line = parse(self.scan.numbers[place], raw)
        assert line is not None, raw
        return self._encoding.cut(self._encoding(line))

    @property
    def lengths(self) -> array[int]:
        """Tokens of each conversation, after cutting."""
        limit = self._encoding.max_seq_length or 2**32 - 1
        return array("I", (min(self.scan.lengths[place], limit) for place in self._kept))


class PackedDataset(torch.utils.data.Dataset[list[Example]]):
    """Rows of several conversations that together have at most `max_seq_length` tokens, for `PackingCollator`.

    Each conversation is in one row, drawn in an order that `seed` decides, and put into the fullest of the open rows
    that has room for it.
    """

    OPEN = 64  # rows that are being filled at a time: enough to leave little room, few enough to mix lengths

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


def _refuse_bad_lines(path: Path, found: Scan) -> None:
    if not found.bad_count:
        return
    shown = "; ".join(f"line {bad.number}: {bad.cause}" for bad in found.bad[:SHOWN])
    more = f"; and {found.bad_count - SHOWN} more" if found.bad_count > SHOWN else ""
    raise UserError(f"{path}: {shown}{more} (hunyuan-vllm data check {path} lists them all)")


def _warnings(path: Path, found: Scan) -> list[str]:
    limit, warnings = found.max_seq_length, []
    if found.truncated:
        warnings.append(f"{path}: {found.truncated} of {len(found)} conversations are cut at {limit} tokens")
    if found.without_answer:
        warnings.append(f"{path}: {found.without_answer} are skipped: cutting leaves no answer of them to learn")
    return warnings


def _stamp(path: Path) -> tuple[int, int]:
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return state.st_size, state.st_mtime_ns
