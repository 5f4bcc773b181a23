"""A run in a process of its own, which the engine's processes outlive in no case, and which alone gets Ctrl-C.

vLLM's processes stay behind, with the GPUs' memory, if the one that started them is killed; and a terminal sends
Ctrl-C to them too, upon which they drop their work.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

__all__ = ["guarded"]

PR_SET_PDEATHSIG = 1


def guarded(run: Callable[[], int]) -> int:
    """Call `run` in a child process with a session of its own, and return what it returns, in both processes.

    SIGINT, SIGTERM and SIGHUP are handed on to the child alone. When either process ends, whatever ended it, all
    processes of the session end. Call it before any thread is started.
    """
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, _end_session)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            _end_session()
        return run()

    def hand_on(number: int, frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, hand_on)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return status if status >= 0 else 128 - status


def _end_session(number: int = 0, frame: FrameType | None = None) -> None:
    os.killpg(0, signal.SIGKILL)
