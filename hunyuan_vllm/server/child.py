"""The server's process: started in a session of its own, its output passed on, and nothing of it left when it ends."""

from __future__ import annotations

import collections
import ctypes
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import psutil

from hunyuan_vllm.server.shared_memory import mapped_shared_memory
from hunyuan_vllm.server.sockets import remove_deserted_sockets

__all__ = ["Child", "cause_of_death"]

TAIL_LINES = 400
GRACE = 5.0  # seconds
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ERROR_LINE = re.compile(r"(?:^|[\s\]])((?:[A-Za-z_]\w*\.)*[A-Za-z_]*(?:Error|Exception|Interrupt): \S.*)")
# Lines that only say that some other process failed.
SECOND_HAND = (
    "See root cause above",
    "Engine core initialization failed",
    "EngineCore encountered an issue",
    "Worker failed with error",
)
TRACKER = "multiprocessing.resource_tracker"


class Child:
    """A running server: its front end, and the processes that starts.

    What it writes goes to standard output; its last lines are kept in `tail`.
    """

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        _adopt_orphans()
        self._shared_memory: set[Path] = set()
        self._strangers = set(psutil.Process().children(recursive=True))
        self._process = subprocess.Popen(
            argv,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches this process alone, which hands it on once. The server ends if this process is killed.
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        assert self._process.stdout is not None
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self._pump = threading.Thread(target=_copy_output, args=(self._process.stdout, self.tail), daemon=True)
        self._pump.start()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, seconds: float) -> None:
        """Until it has ended, but no longer than that."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def note_shared_memory(self) -> None:
        """Remember what it shares with others by now, to free it in the end: Ray's workers may be killed by then."""
        self._shared_memory |= mapped_shared_memory(self._family())

    def stop(self) -> None:
        """Ask the front end to end, which lets requests finish first."""
        if self.running:
            self._process.terminate()  # not SIGINT, which a server that was started in the background ignores

    def kill(self) -> None:
        """End all of its processes at once, but for those that free the others' shared memory as their last act."""
        for process in self._family():
            with suppress(psutil.Error):
                if TRACKER not in " ".join(process.cmdline()):
                    process.kill()

    def bury(self, in_order: bool) -> int:
        """After it has ended, end what it left: a worker without its engine keeps its memory for ever.

        Args:
            in_order: it was told to end, so that the others are about to end by themselves.

        Returns:
            Its exit status, as a shell has it: 128 + n if signal n ended it.
        """
        if in_order:
            self._await_end()
        self.kill()
        self._await_end()  # of those that free shared memory
        for process in self._family():
            with suppress(psutil.Error):
                process.kill()
        self._await_end()
        self._pump.join(timeout=GRACE)
        for block in self._shared_memory:
            with suppress(OSError):
                block.unlink(missing_ok=True)
        remove_deserted_sockets()
        status = self._process.returncode
        return status if status >= 0 else 128 - status

    def _await_end(self) -> None:
        deadline = time.monotonic() + GRACE
        while (left := self._family()) and time.monotonic() < deadline:
            psutil.wait_procs(left, timeout=0.05)  # which takes note of the death of those that are ours by now

    def _family(self) -> set[psutil.Process]:
        """All of its processes, orphans included; the dead ones too while nobody has taken note."""
        return set(psutil.Process().children(recursive=True)) - self._strangers


def cause_of_death(lines: Sequence[str]) -> str | None:
    """The last first-hand error in a server's output, without the log prefix; None if there is none."""
    for line in reversed(lines):
        for text in reversed(_messages(line)):
            match = ERROR_LINE.search(text.rstrip())
            if match and not any(phrase in match[1] for phrase in SECOND_HAND):
                return match[1]
    return None


def _messages(line: str) -> list[str]:
    """What a line of the log says: itself, or the lines in a JSON record (serve --json-logs)."""
    if line.startswith("{"):
        with suppress(ValueError):
            record = json.loads(line)
            return f"{record.get('message')}\n{record.get('exc_info', '')}".splitlines()
    return [line]


def _copy_output(pipe: BinaryIO, tail: collections.deque[str]) -> None:
    for line in pipe:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        tail.append(line.decode(errors="replace"))


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _adopt_orphans() -> None:
    """Have processes whose parents die become children of this one, which then knows them and can end them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
