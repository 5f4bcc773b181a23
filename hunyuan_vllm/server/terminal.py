"""A server that is started from a terminal: one line a stage, and its log in a file"""

import os
import re
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

LOG_LIMIT = 16 * 2**20  # bytes; the log before it is kept as well
# A stage begins when vLLM logs such a line, the first at once.
STAGES = (
    ("starting vLLM", re.compile(b"")),
    ("loading the model", re.compile(b"Starting to load model")),
    ("compiling and warming up", re.compile(b"Loading weights took|Model loading took")),
    ("starting the API", re.compile(rb"init engine \(.*\) took")),
)
ERROR = re.compile(r"\b(ERROR|CRITICAL)\b|\w(Error|Exception)\b")
SHOWN_LINES = 12
REDRAWN_EVERY = 1.0  # seconds


class LogFile:
    """A file that only its owner can read. The one before it, at a new start or when it is full, gets the suffix .1."""

    def __init__(self, path: Path, limit: int = LOG_LIMIT) -> None:
        """Raises OSError if it cannot be made."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path, self._limit = path, limit
        self._descriptor = self._open()

    def write(self, line: bytes) -> None:
        with suppress(OSError):  # a full disk does not stop a server
            if self._size + len(line) > self._limit:
                full, self._descriptor = self._descriptor, self._open()
                os.close(full)
            self._size += os.write(self._descriptor, line)

    def _open(self) -> int:
        with suppress(FileNotFoundError):
            self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._size = 0
        return descriptor


class Terminal:
    """Shows the stages of a start; everything that the server writes goes to the log."""

    def __init__(self, log: LogFile) -> None:
        self.log = log
        self._clear = "" if os.environ.get("TERM", "dumb") == "dumb" else "\r\x1b[K"
        self._reached = len(STAGES)  # the last stage that `write` has found
        self._begun: deque[tuple[int, float]] = deque()  # those that it found and `show` has not printed, with times
        self._stage: int | None = None  # the one whose line is open
        self._started = self._drawn = 0.0

    def start(self) -> None:
        """A server is about to be started."""
        self._reached = 0
        self._begun.append((0, time.monotonic()))

    def write(self, line: bytes) -> None:
        """Called in the thread that reads the server's output; `show` prints."""
        self.log.write(line)
        for number in range(self._reached + 1, len(STAGES)):
            if STAGES[number][1].search(line):
                self._reached = number
                self._begun.append((number, time.monotonic()))

    def show(self) -> None:
        """Bring the lines up to date. Called every now and then while a server starts."""
        while self._begun:
            stage, began = self._begun.popleft()
            self._end(began)
            self._stage, self._started = stage, began
        now = time.monotonic()
        if self._stage is not None and self._clear and now - self._drawn >= REDRAWN_EVERY:
            self._drawn = now
            self._print(f"{self._clear}{self._line(now)}")

    def finish(self) -> None:
        """The server is ready, or has ended."""
        self.show()
        self._end(time.monotonic())
        self._reached = len(STAGES)

    def show_errors(self, lines: Iterable[str]) -> None:
        """The lines that matter of the end of a failed server's output."""
        all_lines = list(lines)
        for line in ([line for line in all_lines if ERROR.search(line)] or all_lines)[-SHOWN_LINES:]:
            self._print(f"  {line.rstrip()}\n")
        self._print(f"hunyuan-vllm: the whole log is in {self.log.path}; --verbose shows it here\n")

    def _line(self, now: float) -> str:
        stage = self._stage or 0
        return f"[{stage + 1}/{len(STAGES)}] {STAGES[stage][0]}  {now - self._started:.0f} s"

    def _end(self, now: float) -> None:
        if self._stage is not None:
            self._print(f"{self._clear}{self._line(now)}\n")
            self._stage = None

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)
