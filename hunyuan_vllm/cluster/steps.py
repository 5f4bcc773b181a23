"""One step for many machines: at most so many at a time, progress shown, and one machine's failure its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Steps"]

Item = TypeVar("Item")


class Steps:
    """Runs steps with up to `jobs` threads, and says on `console` what is being done.

    A terminal shows a bar while a step runs; elsewhere there is a line when it is done.
    """

    def __init__(self, jobs: int, console: Console) -> None:
        self._jobs = jobs
        self._console = console

    def run(self, title: str, items: Sequence[Item], action: Callable[[Item], None]) -> None:
        """Call `action` with each item. It is expected to keep what goes wrong with its item to itself."""
        if not items:
            return
        started = time.monotonic()
        pool = ThreadPoolExecutor(min(self._jobs, len(items)), thread_name_prefix=title)
        try:
            with self._bar() as bar:
                task = bar.add_task(title, total=len(items))
                for future in as_completed([pool.submit(action, item) for item in items]):
                    future.result()
                    bar.advance(task)
        finally:
            # All are done, or this was interrupted: who waits for a host that says nothing is not waited for.
            pool.shutdown(wait=False, cancel_futures=True)
        if not self._console.is_terminal:
            self.say(f"{title}: {len(items)} done in {time.monotonic() - started:.1f} s")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=self._console, disable=not self._console.is_terminal)
