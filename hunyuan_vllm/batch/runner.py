"""Runs a batch's requests through the engine, with progress"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack

from pydantic import BaseModel
from rich.console import Console

from hunyuan_vllm.batch.lines import Line
from hunyuan_vllm.batch.requests import BadLine, Record, Request, Settings, answered, failed
from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import duration


class Reporter:
    """Counts what is written, and shows it while the block it manages runs.

    Args:
        total: lines of the input.
        left: those that this run has to write.
        failed: those that earlier runs wrote with an error.
    """

    def __init__(self, total: int, left: int, failed: int, console: Console) -> None:
        self.total, self.left, self.failed = total, left, failed
        self._left_at_start, self._tokens = left, 0
        self._started = time.monotonic()
        self._console, self._progress = console, Progress(console)
        self._shown = ExitStack()
        self.say = self._progress.say

    def loading(self) -> AbstractContextManager[object]:
        """Show on a terminal that the block is running."""
        return self._console.status("loading the model")

    def __enter__(self) -> None:
        self._started = time.monotonic()
        stage = self._progress.stage("answered", self.total, self.total - self.left, unit="lines")
        self._shown.enter_context(stage)

    def __exit__(self, *_: object) -> None:
        self._shown.close()

    def advance(self, records: Sequence[Record]) -> None:
        """Count records that have been written."""
        self.left -= len(records)
        self.failed += sum(record.failed for record in records)
        self._tokens += sum(record.tokens for record in records)
        failed = f"{self.failed:,} failed, " if self.failed else ""
        self._progress.advance(len(records), f"{failed}{self._rate():,.0f} tokens/s")

    def summary(self) -> str:
        """What has been written and how fast."""
        written = self._left_at_start - self.left
        answered = self.total - self.left - self.failed
        text = f"{answered} of {self.total} lines answered, {self.failed} failed"
        if not written:
            return text
        took = duration(time.monotonic() - self._started)
        return f"{text}; {written} in this run: {self._tokens:,} tokens in {took}, {self._rate():,.0f} tokens/s"

    def _rate(self) -> float:
        """Tokens generated a second in this run."""
        return self._tokens / max(time.monotonic() - self._started, 1e-3)


WRITE_EVERY = 0.25  # seconds; what a kill can cost of the lines that are answered


class Runner:
    """One pass over the pending lines.

    Attributes:
        draining: no more lines are started.

    Args:
        answer: asks the engine; raises BadLine if the request has no answer.
        settings: the run's, for the records.
        write: puts records on the disk.
        window: lines in flight at most, those that wait to be written included.
    """

    def __init__(
        self,
        answer: Callable[[Request], Awaitable[BaseModel]],
        settings: Settings,
        write: Callable[[Sequence[Record]], None],
        window: int,
    ) -> None:
        self._answer, self._settings, self._write = answer, settings, write
        self._slots = asyncio.Semaphore(window)
        self._running: set[asyncio.Task[None]] = set()
        self._finished: list[Record] = []
        self.draining = False

    @property
    def in_flight(self) -> int:
        return len(self._running)

    def drain(self) -> None:
        """Start no more lines; `run` returns when those in flight are written."""
        self.draining = True
        self._slots.release()  # wakes the one who waits for a slot to start the next line

    def drop(self) -> None:
        """Give up the lines in flight as well: nothing is written of them."""
        self.drain()
        for task in self._running:
            task.cancel()

    async def run(self, requests: Iterable[tuple[Line, Request | BadLine]]) -> None:
        """Run until all lines are written, or as `drain` and `drop` say.

        Raises:
            Exception: what `answer` or `write` raised first. Lines answered by then are written if they can be.
        """
        try:
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(self._write_often())
                await self._feed(group, requests)
                while self._running:
                    await asyncio.wait(self._running)
                writer.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            self._flush()

    async def _feed(self, group: asyncio.TaskGroup, requests: Iterable[tuple[Line, Request | BadLine]]) -> None:
        for line, request in requests:
            await self._slots.acquire()
            if self.draining:
                return
            task = group.create_task(self._one(line, request))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            await asyncio.sleep(0)  # taking a free slot does not let the other tasks run

    async def _one(self, line: Line, request: Request | BadLine) -> None:
        try:
            if isinstance(request, BadLine):
                raise request
            record = answered(line, self._settings, await self._answer(request))
        except BadLine as bad:
            record = failed(line, self._settings, bad)
        task = asyncio.current_task()
        if task and not task.cancelling():  # vLLM answers a cancelled request with an error, which is not the line's
            self._finished.append(record)

    async def _write_often(self) -> None:
        while True:
            await asyncio.sleep(WRITE_EVERY)
            self._flush()

    def _flush(self) -> None:
        records, self._finished = self._finished, []
        if records:
            self._write(records)
        for _ in records:
            self._slots.release()
