"""Runs the server: starts it, says when it answers, hands signals on, and names the cause if it dies before that."""

from __future__ import annotations

import collections
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import BinaryIO

from hunyuan_vllm.server.launch import Launch

__all__ = ["cause_of_death", "run"]

TAIL_LINES = 400
GRACE = 5.0  # seconds
PR_SET_PDEATHSIG = 1
ERROR_LINE = re.compile(r"(?:^|[\s\]])((?:[A-Za-z_]\w*\.)*[A-Za-z_]*(?:Error|Exception|Interrupt): \S.*)")
# Lines that only say that some other process failed.
SECOND_HAND = (
    "See root cause above",
    "Engine core initialization failed",
    "EngineCore encountered an issue",
    "Worker failed with error",
)


def run(launch: Launch, environ: Mapping[str, str], wait_until_ready: Callable[[Launch], bool]) -> int:
    """Start the server, stay with it, and return its exit status (128 + n if signal n ended it).

    Args:
        environ: what it inherits; `launch.env` is set on top.
        wait_until_ready: one probe of the server; True once it has answered a request.
    """
    started = time.monotonic()
    child = subprocess.Popen(
        launch.argv,
        env={**environ, **launch.env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # Ctrl-C reaches this process alone, which hands it on once. The server ends if this process is killed.
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    assert child.stdout is not None
    tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
    pump = threading.Thread(target=_copy_output, args=(child.stdout, tail), daemon=True)
    pump.start()
    stopping = threading.Event()
    _hand_on_signals(child, stopping)

    ready = False
    while child.poll() is None:
        if not ready and not stopping.is_set() and wait_until_ready(launch):
            ready = True
            _announce(launch, time.monotonic() - started)
        try:
            child.wait(timeout=None if ready else 0.5)
        except subprocess.TimeoutExpired:
            continue
    pump.join(timeout=5)
    _end_leftovers(child.pid)
    status = child.returncode if child.returncode >= 0 else 128 - child.returncode
    if not ready and not stopping.is_set():
        cause = cause_of_death(tail) or f"no error was logged (exit status {status})"
        print(f"\nhunyuan-vllm: the server stopped before it was ready: {cause}", file=sys.stderr, flush=True)
        return status or 1
    return status


def cause_of_death(lines: collections.deque[str]) -> str | None:
    """The last first-hand error in a server's output, without the log prefix; None if there is none."""
    for line in reversed(lines):
        match = ERROR_LINE.search(line.rstrip())
        if match and not any(phrase in match[1] for phrase in SECOND_HAND):
            return match[1]
    return None


def _announce(launch: Launch, seconds: float) -> None:
    header = ""
    if launch.key_file is not None:
        header = f' -H "Authorization: Bearer $(cat {launch.key_file})"'
    elif launch.needs_key:
        header = ' -H "Authorization: Bearer $VLLM_API_KEY"'
    question = '{"messages": [{"role": "user", "content": "Why is sea water salty?"}]}'
    address = f"http://{_in_url(launch.host)}:{launch.port}"
    print(
        f"\nhunyuan-vllm: ready after {seconds:.0f} s on {address} (model: {launch.model_name}). Ask it something:\n"
        f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json'{header} -d '{question}'\n",
        flush=True,
    )


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _copy_output(pipe: BinaryIO, tail: collections.deque[str]) -> None:
    for line in pipe:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        tail.append(line.decode(errors="replace"))


def _hand_on_signals(child: subprocess.Popen[bytes], stopping: threading.Event) -> None:
    def forward(number: int, frame: FrameType | None) -> None:
        again = stopping.is_set()
        stopping.set()
        if again:
            os.killpg(child.pid, signal.SIGKILL)
        elif child.poll() is None:
            print("\nhunyuan-vllm: stopping the server (once more to kill it)", file=sys.stderr, flush=True)
            child.terminate()  # not SIGINT, which a server that was started in the background ignores

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_leftovers(group: int) -> None:
    """Kill what the server left in its session: a worker without its engine keeps its memory for ever.

    Not at once: the last helper to go frees the shared memory of the others.
    """
    deadline = time.monotonic() + GRACE
    try:
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
