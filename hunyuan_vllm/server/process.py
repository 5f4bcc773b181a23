"""The server's process: its output, signals, and the cleanup when it exits"""

import collections
import ctypes
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import psutil

from hunyuan_vllm.util.machine import await_exits
from hunyuan_vllm.util.streams import make_output_unfailing

SHARED_MEMORY = "/dev/shm/psm_"  # the prefix of multiprocessing's blocks
SOCKET_DIRECTORY = "VLLM_RPC_BASE_PATH"
DIRECTORIES = ("TMPDIR", SOCKET_DIRECTORY)
# The file through which a server's workers meet, as vLLM's log names it. vLLM does not remove it.
RENDEZVOUS = re.compile(r"\bdistributed_init_method=file://(/\S*/vllm_dist_[0-9a-f]{32})\b")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def make_directories(environ: Mapping[str, str]) -> Iterator[str]:
    """Create the directories that `environ` names and that do not exist (any more).

    Yields:
        a line for each: that it has been created, or why it cannot be.
    """
    for name in DIRECTORIES:
        directory = environ.get(name)
        if directory and not os.path.isdir(directory):
            try:
                os.makedirs(directory, mode=0o700)
                yield f"{name}={directory} did not exist and has been created"
            except OSError as error:
                yield f"{name}={directory} is not a directory and cannot be created: {error.strerror}"


def remove_stale_sockets(environ: Mapping[str, str] = os.environ) -> None:
    """Remove this user's sockets with vLLM's names on which no process listens."""
    with suppress(OSError):  # no such directory
        for entry in os.scandir(environ.get(SOCKET_DIRECTORY) or tempfile.gettempdir()):
            if UUID.fullmatch(entry.name):
                with suppress(OSError):  # another process has removed it
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid() and _is_stale(entry.path):
                        Path(entry.path).unlink(missing_ok=True)


def _is_stale(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except BlockingIOError:  # a process listens, with a full queue
            pass
    return False


NOTIFY_SOCKET = "NOTIFY_SOCKET"


def notify_systemd(*states: str, environ: Mapping[str, str] = os.environ) -> None:
    """Send lines such as READY=1, STATUS=…, STOPPING=1 or WATCHDOG=1; does nothing outside a Type=notify service."""
    address = environ.get(NOTIFY_SOCKET, "")
    if not address.startswith(("/", "@")):
        return
    if address[0] == "@":  # an abstract socket
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.sendto("\n".join(states).encode(), address)


TAIL_LINES = 400
MAX_LINE = 16 * 2**10  # bytes; longer lines are passed on in pieces
EXIT_TIMEOUT = 5.0  # seconds
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TRACKER = "multiprocessing.resource_tracker"


class Child:
    """A running server: its front end and the processes that one starts.

    Its output goes to standard output, or to `output`; the last lines are kept in `tail`.
    """

    def __init__(
        self, argv: Sequence[str], environ: Mapping[str, str], output: Callable[[bytes], object] | None = None
    ) -> None:
        make_output_unfailing()  # a server blocks once its output is not read any more
        # Processes whose parents exit become children of this one, which can then find and kill them.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._leftovers: set[Path] = set()  # files to remove when it has exited
        self._unrelated = set(psutil.Process().children(recursive=True))
        self._process = subprocess.Popen(
            argv,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches this process alone, which forwards it once. The server stops if this process is killed.
            start_new_session=True,
            preexec_fn=_stop_with_parent,
        )
        assert self._process.stdout is not None
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        arguments = (self._process.stdout, output or sys.stdout.buffer.write)
        self._copier = threading.Thread(target=self._copy_output, args=arguments, daemon=True)
        self._copier.start()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def exit_code(self) -> int:
        """The front end's, once it has exited; negative if a signal ended it."""
        code: int = self._process.returncode
        return code

    def wait(self, seconds: float) -> None:
        """Return once it has exited, or after that time."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def note_shared_memory(self) -> None:
        """Remember the shared memory in use now, to free it after the exit: Ray's workers may be killed by then."""
        for process in self._descendants():
            with suppress(psutil.Error, OSError):
                mapped = [Path(block.path) for block in process.memory_maps()]
                self._leftovers |= {file for file in mapped if str(file).startswith(SHARED_MEMORY)}

    def stop(self) -> None:
        """Tell the front end to exit, after the requests in flight."""
        if self.running:
            self._process.terminate()  # a server started in the background ignores SIGINT

    def kill(self) -> None:
        """Kill all its processes, except the resource trackers, which free shared memory once the others are gone."""
        for process in self._descendants():
            with suppress(psutil.Error):
                if TRACKER not in " ".join(process.cmdline()):
                    process.kill()

    def reap(self, graceful: bool) -> int:
        """Once the front end has exited, end its other processes and remove their files.

        Args:
            graceful: it was told to stop, so the others are about to exit by themselves.

        Returns:
            Its exit status as a shell reports it: 128 + n if signal n ended it.
        """
        if graceful:
            self._await_exits()
        self.kill()
        self._await_exits()  # of the resource trackers
        for process in self._descendants():
            with suppress(psutil.Error):
                process.kill()
        self._await_exits()
        self._copier.join(timeout=EXIT_TIMEOUT)
        for file in self._leftovers:
            with suppress(OSError):
                file.unlink(missing_ok=True)
        remove_stale_sockets()
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code

    def _copy_output(self, pipe: BinaryIO, output: Callable[[bytes], object]) -> None:
        while line := pipe.readline(MAX_LINE):
            output(line)
            text = line.decode(errors="replace")
            self.tail.append(text)
            if match := RENDEZVOUS.search(text):
                self._leftovers.add(Path(match[1]))

    def _await_exits(self) -> None:
        deadline = time.monotonic() + EXIT_TIMEOUT
        while (left := self._descendants()) and time.monotonic() < deadline:
            await_exits(left, timeout=0.05)

    def _descendants(self) -> set[psutil.Process]:
        """All its processes, with those whose parent has exited, and zombies."""
        return set(psutil.Process().children(recursive=True)) - self._unrelated


def _stop_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


SLEEP_STEP = 0.1  # seconds


class Stop:
    """Forwards SIGTERM to the running server, and SIGINT and SIGHUP unless they were ignored before.

    Attributes:
        since: when the first of them came, by time.monotonic(); None before.
        killed: a second one came, which kills the server.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self.killed = False
        self._child: Child | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup has a process ignore SIGHUP, a shell has its background jobs ignore SIGINT
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    @property
    def requested(self) -> bool:
        return self.since is not None

    def forward_to(self, child: Child) -> None:
        """From now on signals are for this server; one that came before is forwarded at once."""
        self._child = child
        if self.requested:
            child.stop()

    def sleep(self, seconds: float) -> None:
        """Sleep until then, or until a signal comes."""
        until = time.monotonic() + seconds
        while not self.requested and time.monotonic() < until:
            time.sleep(min(SLEEP_STEP, max(until - time.monotonic(), 0)))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        child = self._child if self._child and self._child.running else None
        if self.requested:
            if child:
                self.killed = True
                child.kill()
            return
        self.since = time.monotonic()
        if child:
            child.stop()
        print("\nhunyuan-vllm: stopping the server (once more to kill it)", file=sys.stderr, flush=True)
