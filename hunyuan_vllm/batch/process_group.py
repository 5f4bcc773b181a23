"""Run a function in a child process with its own session, so that no engine process outlives it or receives Ctrl-C.

If the process that started vLLM is killed, vLLM's processes stay behind and hold the GPUs' memory; and a terminal sends
Ctrl-C to them as well, which makes them drop their work.
"""

import ctypes
import os
import signal
import warnings
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

PR_SET_PDEATHSIG = 1
# Warnings of libraries, meant for developers, would break the progress bar.
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def run_in_session(run: Callable[[], int]) -> int:
    """Call `run` in a child process with its own session and no warnings; returns its result, in both processes.

    SIGINT, SIGTERM and SIGHUP are forwarded to the child only. When either process ends, for any reason, all processes
    of the session are killed. Call it before any thread is started.
    """
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, _kill_session)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            _kill_session()
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        warnings.simplefilter("ignore")
        return run()

    def forward(number: int, frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return status if status >= 0 else 128 - status


def _kill_session(number: int = 0, frame: FrameType | None = None) -> None:
    os.killpg(0, signal.SIGKILL)
