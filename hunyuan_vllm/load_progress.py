"""How far the loading of a checkpoint is, on standard error: a bar on a terminal, a line in the log elsewhere.

Loads of a few seconds say nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from math import prod

from torch import Tensor
from tqdm import tqdm
from vllm.logger import init_logger

from hunyuan_vllm.layout import Layout

__all__ = ["LoadProgress"]

QUIET = 3.0  # seconds before a bar appears, and that a load must take to be summed up
LINE_EVERY = 10.0  # seconds

logger = init_logger(f"vllm.{__name__}")

Named = tuple[str, Tensor]


class LoadProgress:
    """Counts tensors as they pass through `reading` and `quantised`, and shows it.

    Args:
        layout: what the checkpoint holds.
        shown: this process is the one that speaks.
        bar: show a bar if standard error is a terminal.
    """

    def __init__(self, layout: Layout, *, shown: bool, bar: bool = True) -> None:
        self._expected = layout.expected
        self._elements = sum(map(prod, layout.expected.values()))
        self._shown, self._bar_wanted = shown, bar and sys.stderr.isatty()
        self._done = self._count = self._bytes_read = self._bytes_quantised = 0

    def reading(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """Pass on what the checkpoint holds; the next is asked for when the last has been loaded."""
        self._started = self._reported = time.monotonic()
        bar = tqdm(
            total=self._elements,
            disable=not (self._shown and self._bar_wanted),
            delay=QUIET,
            bar_format="Loading weights: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}",
        )
        with bar:
            for name, tensor in tensors:
                yield name, tensor
                if name not in self._expected:
                    continue
                self._count += 1
                self._done += tensor.numel()
                self._bytes_read += tensor.nbytes
                bar.set_postfix_str(self._amounts(), refresh=False)
                bar.update(tensor.numel())
                self._say_where_it_is()
        if self._shown and self._seconds() >= QUIET:
            logger.info("Loaded %s in %s", self._amounts(), _duration(self._seconds()))

    def quantised(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """Pass on what a checkpoint's tensor was quantised to."""
        for name, tensor in tensors:
            self._bytes_quantised += tensor.nbytes
            yield name, tensor

    def _say_where_it_is(self) -> None:
        if not self._shown or self._bar_wanted or time.monotonic() - self._reported < LINE_EVERY:
            return
        self._reported = time.monotonic()
        share = self._done / self._elements
        left = _duration(self._seconds() * (1 / share - 1)) if share < 1 else "0:00"
        logger.info("Loading weights: %.0f%%, %s, %s left", 100 * share, self._amounts(), left)

    def _amounts(self) -> str:
        quantised = f", {self._bytes_quantised / 1e9:.1f} GB quantised" if self._bytes_quantised else ""
        return f"{self._count:,} of {len(self._expected):,} tensors, {self._bytes_read / 1e9:.1f} GB read{quantised}"

    def _seconds(self) -> float:
        return time.monotonic() - self._started


def _duration(seconds: float) -> str:
    """As in 1:02:03 or 2:03."""
    return tqdm.format_interval(seconds).removeprefix("0")
