"""Runs a batch's requests through the engine, and reports progress"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager

from pydantic import BaseModel

from hunyuan_vllm.batch.output import Record, Settings, answered, failed
from hunyuan_vllm.batch.requests import BadLine, Request
from hunyuan_vllm.util.jsonl import Line
from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import duration


class Reporter:
    """Counts what is written.

    Args:
        left: those that this run has to write.
        failed: those that earlier runs wrote with an error.
    """

    def __init__(self, total: int, left: int, failed: int, progress: Progress) -> None:
        self.total, self.left, self.failed = total, left, failed
        self.progress = progress
        self._left_at_start = left
        self._tokens = 0
        self._started = time.monotonic()

    def writing(self) -> AbstractContextManager[None]:
        """Show progress while the block runs."""
        self._started = time.monotonic()
        return self.progress.stage("answered", self.total, self.total - self.left, unit="lines")

    def advance(self, records: Sequence[Record]) -> None:
        """Count records that have been written."""
        self.left -= len(records)
        self.failed += sum(record.failed for record in records)
        self._tokens += sum(record.tokens for record in records)
        failed = f"{self.failed:,} failed, " if self.failed else ""
        self.progress.advance(len(records), f"{failed}{self._rate()}")

    def summary(self) -> str:
        """What has been written and how fast."""
        written = self._left_at_start - self.left
        text = f"{self.total - self.left - self.failed} of {self.total} lines answered, {self.failed} failed"
        if not written:
            return text
        seconds = duration(time.monotonic() - self._started)
        return f"{text}; {written} in this run: {self._tokens:,} tokens in {seconds}, {self._rate()}"

    def _rate(self) -> str:
        return f"{self._tokens / max(time.monotonic() - self._started, 1e-3):,.0f} tokens/s"


WRITE_EVERY = 0.25  # seconds; answers of the last so many seconds are lost if the process is killed


class Runner:
    """One pass over the pending lines.

    Args:
        answer: asks the engine; raises BadLine if the request has no answer.
        window: maximum of lines in flight, those that wait to be written included.
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
        self._slots.release()  # wakes `_feed`, which may wait for a slot

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
