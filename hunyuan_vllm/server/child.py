"""The server's process: started in a session of its own, its output passed on, and nothing of it left when it ends."""

from __future__ import annotations

import collections
import ctypes
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
from hunyuan_vllm.server.temporary_files import remove_deserted_sockets, rendezvous_file
from hunyuan_vllm.streams import make_output_unfailing

__all__ = ["Child"]

TAIL_LINES = 400
LONGEST_LINE = 16 * 2**10  # bytes; what is longer is passed on in pieces
GRACE = 5.0  # seconds
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TRACKER = "multiprocessing.resource_tracker"


class Child:
    """A running server: its front end, and the processes that starts.

    What it writes goes to standard output; its last lines are kept in `tail`.
    """

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        make_output_unfailing()  # a server whose output is not read any more would stand still
        _adopt_orphans()
        self._leftovers: set[Path] = set()  # files to remove in the end
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
        self._pump = threading.Thread(target=self._copy_output, args=(self._process.stdout,), daemon=True)
        self._pump.start()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def exit_code(self) -> int:
        """Of the front end, once it has ended; negative if a signal ended it."""
        code: int = self._process.returncode
        return code

    def wait(self, seconds: float) -> None:
        """Until it has ended, but no longer than that."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def note_shared_memory(self) -> None:
        """Remember what it shares with others by now, to free it in the end: Ray's workers may be killed by then."""
        self._leftovers |= mapped_shared_memory(self._family())

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
        for file in self._leftovers:
            with suppress(OSError):
                file.unlink(missing_ok=True)
        remove_deserted_sockets()
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code

    def _copy_output(self, pipe: BinaryIO) -> None:
        while line := pipe.readline(LONGEST_LINE):
            sys.stdout.buffer.write(line)
            text = line.decode(errors="replace")
            self.tail.append(text)
            if file := rendezvous_file(text):
                self._leftovers.add(file)

    def _await_end(self) -> None:
        deadline = time.monotonic() + GRACE
        while (left := self._family()) and time.monotonic() < deadline:
            psutil.wait_procs(left, timeout=0.05)  # which takes note of the death of those that are ours by now

    def _family(self) -> set[psutil.Process]:
        """All of its processes, orphans included; the dead ones too while nobody has taken note."""
        return set(psutil.Process().children(recursive=True)) - self._strangers


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _adopt_orphans() -> None:
    """Have processes whose parents die become children of this one, which then knows them and can end them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
