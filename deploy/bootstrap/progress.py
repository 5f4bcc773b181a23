"""Steps with a number, a clock and, on a terminal, the installer's latest line."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from bootstrap.errors import SetupError, explain

__all__ = ["Progress"]

HEARTBEAT = 15.0  # seconds between lines of a long step when the output is not a terminal


class Progress:
    """Reports on `total` steps and runs their commands."""

    def __init__(self, total: int, log: Path, stream: TextIO = sys.stderr) -> None:
        self.total, self.log, self.stream = total, log, stream
        self._number = 0
        self._title = ""
        self._started = 0.0
        self._live = stream.isatty()
        self._open = False  # the last line has no newline yet

    def say(self, line: str) -> None:
        """Print a line of its own."""
        self._end_line()
        print(line, file=self.stream, flush=True)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announce a step, and how long it took when it is done."""
        self._number += 1
        self._title = f"[{self._number}/{self.total}] {title}"
        self._started = time.monotonic()
        self._show("...")
        try:
            yield
        except BaseException:
            self._end_line()
            raise
        self._show(f"{time.monotonic() - self._started:.0f} s")
        self._end_line()

    def run(self, argv: Sequence[str | Path], doing: str, env: Mapping[str, str] | None = None) -> str:
        """Run a command of the current step to its end and return what it wrote.

        Args:
            argv: the command.
            doing: what it is for, in the words of an error message ("installing …").
            env: its whole environment; this process's own if not given.

        Raises:
            SetupError: it failed; the message says why in one line.
        """
        # A process group of its own: Ctrl-C reaches only us, and we end it and whatever it started.
        child = subprocess.Popen(
            [str(part) for part in argv], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            output = self._follow(child)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(str(part) for part in argv)}\n{output}\n")
        if child.returncode:
            raise SetupError(f"{explain(output, doing)} (all output: {self.log})")
        return output

    def _follow(self, child: subprocess.Popen[str]) -> str:
        lines: queue.Queue[str | None] = queue.Queue()
        assert child.stdout is not None
        threading.Thread(target=_pump, args=(child.stdout, lines), daemon=True).start()
        output: list[str] = []
        latest, beat = "", time.monotonic()
        while True:
            try:
                line = lines.get(timeout=1.0)
            except queue.Empty:
                line = ""
            if line is None:
                break
            if line:
                output.append(line)
                latest = line.strip()
            if self._live or time.monotonic() - beat >= HEARTBEAT:
                beat = time.monotonic()
                self._beat(f"{beat - self._started:.0f} s  {latest}")
        child.wait()
        return "".join(output)

    def _beat(self, status: str) -> None:
        if self._live:
            self._show(status)
        else:
            self.say(f"      {status}")

    def _show(self, status: str) -> None:
        if self._live:
            width = os.get_terminal_size(self.stream.fileno()).columns - 1
            self.stream.write("\r\x1b[K" + f"{self._title}  {status}"[:width])
        else:
            self.stream.write(f" {status}" if self._open else f"{self._title}  {status}")
        self._open = True
        self.stream.flush()

    def _end_line(self) -> None:
        if self._open:
            self.stream.write("\n")
            self.stream.flush()
        self._open = False


def _pump(pipe: TextIO, lines: queue.Queue[str | None]) -> None:
    for line in pipe:
        lines.put(line)
    lines.put(None)
