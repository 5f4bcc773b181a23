"""How far a run is, on standard error: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hunyuan_vllm.batch.records import Record

__all__ = ["Reporter"]

LINE_EVERY = 30.0  # seconds


class Reporter:
    """Counts what is written, and shows it while the block it manages runs.

    Args:
        total: lines of the input.
        left: those that this run has to write.
        failed: those that earlier runs wrote with an error.
    """

    def __init__(self, total: int, left: int, failed: int, console: Console) -> None:
        self.total, self.left, self.failed = total, left, failed
        self._left_at_start = left
        self._tokens = 0
        self._console = console
        self._bar: Progress | None = None
        self._started = self._reported = time.monotonic()

    def say(self, text: str) -> None:
        self._console.print(f"hunyuan-vllm: {text}", markup=False, highlight=False, soft_wrap=True)

    def loading(self) -> AbstractContextManager[object]:
        """A sign of life on a terminal while the block runs."""
        return self._console.status("loading the model")

    def __enter__(self) -> None:
        self._started = self._reported = time.monotonic()
        if self._console.is_terminal:
            self._bar = _bar(self._console)
            self._task = self._bar.add_task("", total=self.total, completed=self.total - self.left, rate="", failed="")
            self._bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, records: Iterable[Record]) -> None:
        """Count records that have been written."""
        for record in records:
            self.left -= 1
            self.failed += record.failed
            self._tokens += record.tokens
        if self._bar is not None:
            failed = f"[red]{self.failed} failed" if self.failed else ""
            done = self.total - self.left
            self._bar.update(self._task, completed=done, rate=f"{self._rate():,.0f} tokens/s", failed=failed)
        elif time.monotonic() - self._reported >= LINE_EVERY:
            self._reported = time.monotonic()
            self.say(self._line())

    def summary(self) -> str:
        """What has been written and how fast."""
        seconds = time.monotonic() - self._started
        written = self._left_at_start - self.left
        answered = self.total - self.left - self.failed
        text = f"{answered} of {self.total} lines answered, {self.failed} failed"
        if not written:
            return text
        rate = f"{self._tokens:,} tokens in {_duration(seconds)}, {self._rate():,.0f} tokens/s"
        return f"{text}; {written} in this run: {rate}"

    def _rate(self) -> float:
        """Tokens generated a second in this run."""
        return self._tokens / max(time.monotonic() - self._started, 1e-3)

    def _line(self) -> str:
        written = self._left_at_start - self.left
        seconds_left = self.left * (time.monotonic() - self._started) / written
        failed = f", {self.failed} failed" if self.failed else ""
        rate = f"{self._rate():,.0f} tokens/s"
        return f"{self.total - self.left}/{self.total} lines{failed}, {rate}, {_duration(seconds_left)} left"


def _duration(seconds: float) -> str:
    """As in 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("lines {task.fields[failed]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )
