"""A real server for tests: `hunyuan-vllm serve` in a process of its own, until it says that it is ready."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from forked_programs import ENGINE_TOO, Program

COMMAND = Path(sys.executable).with_name("hunyuan-vllm")
# What conftest.py sets for engines inside the test process, and what would make it another server.
NOT_INHERITED = {"VLLM_ENABLE_V1_MULTIPROCESSING", "MODEL_PATH", "LOCAL_IP", "HOST", "TP_SIZE", "VLLM_API_KEY"}
NOT_INHERITED |= {"GLOO_SOCKET_IFNAME"}  # a server finds its interface itself
START_TIMEOUT = 420.0  # seconds; half a minute on an idle machine


@dataclass
class Server:
    """A running server; `output` grows with what it prints."""

    process: subprocess.Popen[str] | Program
    port: int
    output: list[str]
    reader: threading.Thread

    @property
    def said(self) -> str:
        """All that it has printed; once it has ended, to the last line."""
        if self.process.poll() is not None:
            self.reader.join(timeout=60)
        return "".join(self.output)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> psutil.Process:
        """The process that computes, which the one that answers started."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        return next(process for process in processes if "EngineCore" in " ".join(process.cmdline()))

    @contextmanager
    def halted_engine(self) -> Iterator[None]:
        """In the block nothing is computed, so no answer that needs the engine ends, however slow the machine is."""
        with halted(self.engine):
            yield

    def stop(self) -> int:
        """End it as Ctrl-C would, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=60)


@contextmanager
def halted(engine: psutil.Process) -> Iterator[None]:
    """As `Server.halted_engine`, at once: the process was looked for before."""
    engine.suspend()
    try:
        yield
    finally:
        engine.resume()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def running_server(*flags: str, as_users_do: bool = False, **environ: str) -> Iterator[Server]:
    """Serve MODEL_PATH, or the demo model without it, with a small fixed KV cache.

    Unless `as_users_do`, nothing is compiled, and its processes are forked: a fourth of the time of a start.
    """
    port = free_port()
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    if not as_users_do:
        flags = ("--enforce-eager", *flags)
        inherited |= ENGINE_TOO
    command = [COMMAND, "serve", "--kv-cache-memory-bytes", str(64 * 2**20), *flags]
    inherited |= {"PORT": str(port), **environ}
    process: subprocess.Popen[str] | Program
    if as_users_do:
        process = subprocess.Popen(command, env=inherited, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    else:
        process = Program(command, inherited)
    output: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if "hunyuan-vllm: ready after" in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    server = Server(process, port, output, reader)
    try:
        assert ready.wait(START_TIMEOUT) and process.poll() is None, "".join(output[-80:])
        yield server
    finally:
        server.stop()
        reader.join(timeout=10)
