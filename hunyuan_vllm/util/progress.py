"""The progress display of everything that takes long: a bar on a terminal, a line now and then elsewhere"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from hunyuan_vllm.util.text import duration, gigabytes

LINE_EVERY = 30.0  # seconds


class Progress:
    """Shows one stage after the other; without a terminal, a line every `line_every` seconds."""

    def __init__(self, console: Console, line_every: float = LINE_EVERY) -> None:
        self.console, self._line_every = console, line_every
        self._bars: Bars | None = None

    def say(self, text: str) -> None:
        self.console.print(f"hunyuan-vllm: {text}", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0, unit: str | None = "bytes") -> Iterator[None]:
        """Show a stage while the block runs; `done` is what an earlier run did of it. Without a unit, as percent."""
        self._name, self._total, self._done, self._unit, self._detail = name, total, done, unit, ""
        self._at_start, self._started = done, time.monotonic()
        self._reported = self._started
        if not self.console.is_terminal:
            yield
            return
        with _bars(self.console) as self._bars:
            self._task: TaskID = self._bars.add_task(name, total=total, completed=done, amount=self._amount())
            try:
                yield
            finally:
                self._bars = None

    def advance(self, amount: int, detail: str = "") -> None:
        """Count `amount` more of the stage's unit; `detail` is shown beside it. Several threads may call this."""
        self._done += amount
        self._detail = detail or self._detail
        if self._bars is not None:
            self._bars.update(self._task, completed=self._done, amount=self._amount())
        elif (now := time.monotonic()) - self._reported >= self._line_every:
            self._reported = now
            seconds = (self._total - self._done) * (now - self._started) / max(self._done - self._at_start, 1)
            self.say(f"{self._name}: {self._amount()}, {duration(seconds)} left")

    def _amount(self) -> str:
        if self._unit == "bytes":
            rate = (self._done - self._at_start) / max(time.monotonic() - self._started, 1e-3)
            amount = f"{gigabytes(self._done)} of {gigabytes(self._total)}, {gigabytes(rate)}/s"
        elif self._unit is None:
            amount = f"{100 * self._done / self._total:.0f}%"
        else:
            amount = f"{self._done:,} of {self._total:,} {self._unit}"
        return f"{amount}, {self._detail}" if self._detail else amount


def _bars(console: Console) -> Bars:
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )
