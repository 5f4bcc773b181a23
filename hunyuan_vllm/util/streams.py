"""Standard output and error that never fail: for any text, and for a service also when they cannot be written

A full disk, or a reader that has exited or blocks, must not stop a server or its supervisor.
"""

import atexit
import io
import os
import queue
import select
import sys
import threading

STREAMS = ("stdout", "stderr")
MAX_QUEUED = 4096  # writes that wait for a reader; more are dropped
EXIT_TIMEOUT = 2.0  # seconds in which a reader can take the rest when the process exits


def prepare_output() -> None:
    """Open streams that the caller closed (`>&-`), and escape characters that the terminal's encoding lacks."""
    for name in STREAMS:
        stream = getattr(sys, name)
        if stream is None:
            _occupy_standard_descriptors()
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print a line of our own to standard error."""
    print(f"hunyuan-vllm: {text}", file=sys.stderr, flush=True)


def make_output_unfailing() -> None:
    """Make sys.stdout and sys.stderr accept every write at once; what cannot be written is dropped and counted.

    Any thread and any signal handler may write to them. What goes to one terminal or file by both keeps its order.
    """
    prepare_output()
    outputs: list[_UnfailingOutput] = []
    for name in STREAMS:
        stream = getattr(sys, name)
        if isinstance(getattr(stream, "buffer", None), _UnfailingOutput):
            continue
        try:
            descriptor = stream.fileno()
            if not (outputs and os.path.sameopenfile(descriptor, outputs[0].fileno())):
                outputs.append(_UnfailingOutput(descriptor))
                atexit.register(outputs[-1].finish)
        except (OSError, ValueError):  # in memory, which does not fail
            continue
        try:
            stream.flush()
        except OSError:
            pass
        setattr(sys, name, io.TextIOWrapper(outputs[-1], stream.encoding, "backslashreplace", line_buffering=True))


def _occupy_standard_descriptors() -> None:
    """Else the next file or socket would get the descriptor of standard output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


class _UnfailingOutput(io.RawIOBase):
    """Writes from a thread of its own."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()  # whose put() may interrupt a put()
        self._lock = threading.RLock()  # which a signal handler may take while its thread holds it
        self._dropped = 0  # lines not yet reported
        self._cause = ""
        self._in_line = False  # the last byte written was not a newline
        self._finished = threading.Event()
        threading.Thread(target=self._write_queued, name=f"output {descriptor}", daemon=True).start()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        piece = bytes(data)
        if self._queue.qsize() < MAX_QUEUED:
            self._queue.put(piece)
        else:
            self._drop(piece, "nobody read them")
        return len(piece)

    def finish(self) -> None:
        """Wait until earlier writes are done or dropped, but not for a reader that blocks."""
        self._queue.put(None)
        self._finished.wait(EXIT_TIMEOUT)

    def _write_queued(self) -> None:
        while (piece := self._queue.get()) is not None:
            try:
                self._report_dropped()
                self._write(piece)
            except OSError as error:
                self._drop(piece, error.strerror or type(error).__name__)
        self._finished.set()

    def _report_dropped(self) -> None:
        dropped = self._dropped
        if dropped:
            lines = "1 line" if dropped == 1 else f"{dropped} lines"
            start = "\n" if self._in_line else ""
            self._write(f"{start}hunyuan-vllm: {lines} of output dropped: {self._cause}\n".encode())
            with self._lock:
                self._dropped -= dropped

    def _write(self, piece: bytes) -> None:
        while piece:
            try:
                written = os.write(self._descriptor, piece)
            except BlockingIOError:
                select.select([], [self._descriptor], [])
                continue
            self._in_line = not piece[:written].endswith(b"\n")
            piece = piece[written:]

    def _drop(self, piece: bytes, cause: str) -> None:
        with self._lock:
            self._dropped += piece.count(b"\n") or 1
            self._cause = cause
