"""The operator's wish that the service end: a first signal lets the server finish its work, a second kills it."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType

from hunyuan_vllm.server.child import Child

__all__ = ["Stop"]

PERIOD = 0.1  # seconds


class Stop:
    """Hands SIGTERM on to the server that runs, if one does; SIGINT and SIGHUP too, unless they were ignored before.

    Attributes:
        since: when the first of them came, by time.monotonic(); None before.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self._child: Child | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup has a process ignore SIGHUP, a shell has its background jobs ignore SIGINT
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._take)

    @property
    def requested(self) -> bool:
        return self.since is not None

    def hand_on_to(self, child: Child) -> None:
        """From now on they are for this server, one that has come already included."""
        self._child = child
        if self.requested:
            child.stop()

    def sleep(self, seconds: float) -> None:
        """Until then, or until one comes."""
        until = time.monotonic() + seconds
        while not self.requested and time.monotonic() < until:
            time.sleep(min(PERIOD, max(until - time.monotonic(), 0)))

    def _take(self, number: int, frame: FrameType | None) -> None:
        child = self._child if self._child and self._child.running else None
        if self.requested:
            if child:
                child.kill()
            return
        self.since = time.monotonic()
        if child:
            child.stop()
        print("\nhunyuan-vllm: stopping the server (once more to kill it)", file=sys.stderr, flush=True)
