"""The server's process: output, signals, temporary files, and nothing left when it ends"""

from __future__ import annotations

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import psutil

from hunyuan_vllm.util.streams import make_output_unfailing

PREFIX = "/dev/shm/psm_"  # Python's name for multiprocessing's


def mapped_shared_memory(processes: Iterable[psutil.Process]) -> set[Path]:
    """The blocks that these processes use, whoever made them."""
    found: set[Path] = set()
    for process in processes:
        with suppress(psutil.Error, OSError):
            found |= {Path(one.path) for one in process.memory_maps() if one.path.startswith(PREFIX)}
    return found


SOCKETS = "VLLM_RPC_BASE_PATH"
FOLDERS = ("TMPDIR", SOCKETS)
# The file over which a server's workers find each other, as vLLM's log names it.
RENDEZVOUS = re.compile(r"\bdistributed_init_method=file://(/\S*/vllm_dist_[0-9a-f]{32})\b")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def make_folders(environ: Mapping[str, str]) -> Iterator[str]:
    """Make the folders that `environ` names and that are not there (any more).

    Yields:
        a line for each: that it has been made, or why it cannot be.
    """
    for name in FOLDERS:
        folder = environ.get(name)
        if folder and not os.path.isdir(folder):
            try:
                os.makedirs(folder, mode=0o700)
                yield f"{name}={folder} was not there and has been made"
            except OSError as error:
                yield f"{name}={folder} is not a directory and cannot be made: {error.strerror}"


def rendezvous_file(line: str) -> Path | None:
    """The file that this line of a server's log names, if it is the one over which its workers find each other.

    No process of vLLM removes it when the server ends.
    """
    match = RENDEZVOUS.search(line)
    return Path(match[1]) if match else None


def remove_deserted_sockets(environ: Mapping[str, str] = os.environ) -> None:
    """Remove this user's sockets on which no process listens any more, by the names that vLLM gives them."""
    with suppress(OSError):  # the folder is gone
        for entry in os.scandir(environ.get(SOCKETS) or tempfile.gettempdir()):
            if UUID.fullmatch(entry.name):
                with suppress(OSError):  # the socket is gone
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid() and _is_deserted(entry.path):
                        Path(entry.path).unlink(missing_ok=True)


def _is_deserted(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except BlockingIOError:  # somebody listens, with a full queue
            pass
    return False


SOCKET_VARIABLE = "NOTIFY_SOCKET"


def notify(*states: str, environ: Mapping[str, str] = os.environ) -> None:
    """Send lines such as READY=1, STATUS=…, STOPPING=1 or WATCHDOG=1; without such a systemd, do nothing."""
    address = environ.get(SOCKET_VARIABLE, "")
    if not address.startswith(("/", "@")):
        return
    if address[0] == "@":  # an abstract socket
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.sendto("\n".join(states).encode(), address)


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
