"""Starts Python programs quickly: forks them from a process that has imported vLLM and done nothing else.

`Program` works like subprocess.Popen. Python programs that such a program starts with subprocess.Popen (a server its
front end, an evaluation its engines) are forked from it. Each has its own arguments, environment, working directory,
signal handlers, file descriptors and exit status. Tests of how processes start and end use subprocess instead.
"""

import atexit
import functools
import gc
import importlib
import importlib.metadata
import json
import multiprocessing.process
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import setproctitle

IMPORTED = (
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
)
# Variables with which the processes of a program's engine are forked too.
ENGINE_TOO = {"PYTHONPATH": str(Path(__file__).with_name("forked_engines")), "FORKED_ENGINES": "fork"}
SHARED = "FORKED_PROGRAMS"  # the variable with a shared server's address
BIN = Path(sys.executable).parent
MESSAGE = 1 << 20


class Program:
    """A running program.

    Args:
        argv: the interpreter with -c or -m, or a script of the environment such as hunyuan-vllm.
        stderr: a file for standard error; without one it goes to `stdout` too.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        env: Mapping[str, str],
        cwd: Path | None = None,
        stderr: Any = None,
        start_new_session: bool = False,
    ) -> None:
        words = list(map(str, argv))
        request = {"argv": words, "env": dict(env), "cwd": str(cwd or Path.cwd()), "new_session": start_new_session}
        out, out_end = os.pipe()
        self._replies, replies_end = socket.socketpair()
        with open(os.devnull) as nothing:
            given = [nothing.fileno(), out_end, out_end if stderr is None else stderr.fileno(), replies_end.fileno()]
            socket.send_fds(_server(), [json.dumps(request).encode()], given)
        os.close(out_end)
        replies_end.close()
        self.stdout = open(out, errors="replace")
        self._lines = self._replies.makefile()
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._replies], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = int(self._lines.readline())
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    argv: Sequence[str | Path], env: Mapping[str, str] = os.environ, cwd: Path | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Works like subprocess.run with captured text."""
    with tempfile.TemporaryFile("w+") as errors:
        program = Program(argv, env, cwd, stderr=errors)
        expired = threading.Timer(timeout, program.kill)
        expired.start()
        with program.stdout:
            output = program.stdout.read()
        status = program.wait()
        expired.cancel()
        errors.seek(0)
        return subprocess.CompletedProcess(argv, status, output, errors.read())


_starting = threading.Lock()


def _server() -> socket.socket:
    """A connection to this process's fork server."""
    with _starting:
        return _start_server()


@functools.cache
def _start_server(*listeners: socket.socket) -> socket.socket:
    if not listeners and SHARED in os.environ:
        ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.connect(os.environ[SHARED])
    else:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = [one.fileno() for one in (theirs, *listeners)]
        command = [sys.executable, __file__, *map(str, given)]
        server = subprocess.Popen(command, pass_fds=given, stdin=subprocess.DEVNULL)
        atexit.register(server.kill)
        theirs.close()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE)
    return ours


def share_server() -> None:
    """Start the server for the processes that this one will start, too: it imports vLLM once for all of them."""
    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        os.environ[SHARED] = f"{directory}/programs"
        listener.bind(os.environ[SHARED])
        listener.listen()
        _start_server(listener)


# In the fork server


@functools.cache
def import_vllm() -> None:
    for module in IMPORTED:
        importlib.import_module(module)
    assert not sys.modules["vllm.plugins"].plugins_loaded
    setproctitle.getproctitle()  # later it would look for the title's memory in an environment that has been replaced
    gc.collect()
    gc.freeze()


def serve(owner: socket.socket, *listeners: socket.socket) -> None:
    """Start the programs that are asked for, and report their exit statuses, until the owner's end is closed.

    Args:
        owner, listeners: who asks, and a socket that others who ask connect to.
    """
    connections = {owner}
    running: dict[int, tuple[int, int]] = {}  # pidfd of a program → its PID, and the socket for its status
    while True:
        for ready in select.select([*connections, *listeners, *running], [], [])[0]:
            if ready in listeners:
                connections.add(ready.accept()[0])
                continue
            if ready in running:
                pid, replies = running.pop(ready)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.write(replies, f"{status}\n".encode())
                os.close(replies)
                os.close(ready)
                continue
            message, fds, _, _ = socket.recv_fds(ready, MESSAGE, 4)
            if not message and ready is owner:
                return
            if not message:
                connections.remove(ready)
                ready.close()
                continue
            import_vllm()
            pid = os.fork()
            if pid == 0:
                request = json.loads(message)
                become(standard=fds[:3], **request)
            os.write(fds[3], f"{pid}\n".encode())
            running[os.pidfd_open(pid)] = (pid, fds[3])
            for fd in fds[:3]:
                os.close(fd)


# In a program


class Popen(subprocess.Popen):
    """Forks this environment's Python programs, and executes others."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
                       env: Any, *more: Any) -> None:  # fmt: skip
        words = [args] if isinstance(args, (str, Path)) else list(map(str, args))
        if program_of(words) is None:
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more)
            return
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = more[3:9]
        new_session = more[-2]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            standard = [fd if fd != -1 else number for number, fd in enumerate((p2cread, c2pwrite, errwrite))]
            become(words, standard, os.environ if env is None else env, cwd, pass_fds, new_session, preexec_fn)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def program_of(argv: list[str]) -> Callable[[], object] | None:
    """What runs it in this process; None for a program of another kind."""
    words = _without_interpreter(argv)
    if words is not argv and words[:1] == ["-c"]:
        return lambda: exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    if words is not argv and words[:1] == ["-m"]:
        return lambda: runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    script = Path(words[0]) if words else Path()
    if script.parent == BIN:
        for point in importlib.metadata.entry_points(group="console_scripts", name=script.name):
            return lambda: sys.exit(point.load()())
    return None


def _without_interpreter(argv: list[str]) -> list[str]:
    return argv[2 if argv[1:2] == ["-P"] else 1 :] if argv[0] == sys.executable else argv


def become(
    argv: list[str], standard: Sequence[int], env: Mapping[str, str], cwd: Any, kept: Sequence[int] = (),
    new_session: bool = False, prepare: Callable[[], object] | None = None,
) -> None:  # fmt: skip
    """Run that program in this process, which was just forked, and exit."""
    status = 1
    try:
        program = program_of(argv)
        assert program is not None
        environ = dict(env)
        for number, fd in enumerate([os.dup(fd) for fd in standard]):
            os.dup2(fd, number)
        first = 3
        for fd in sorted(kept):
            os.closerange(first, fd)
            first = fd + 1
        os.closerange(first, 1 << 16)
        signal.set_wakeup_fd(-1)
        for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if new_session:
            os.setsid()
        os.environ.clear()
        os.environ.update(environ)
        if environ.get("TORCH_COMPILE_DISABLE") == "1":  # which torch reads when it is imported
            importlib.import_module("torch._dynamo.config").disable = True
        if "PROMETHEUS_MULTIPROC_DIR" in environ:  # which its client reads when it is imported
            values = importlib.import_module("prometheus_client.values")
            values.ValueClass = values.get_value_class()
        if cwd:
            os.chdir(cwd)
        if prepare:
            prepare()
        atexit._clear()  # what its parent would do at its own end
        weakref.finalize._registry.clear()
        weakref.finalize._registered_with_atexit = False
        multiprocessing.util._finalizer_registry.clear()
        atexit.register(multiprocessing.util._exit_function)
        multiprocessing.resource_tracker._resource_tracker.__init__()
        multiprocessing.process._parent_process = None
        subprocess.Popen = Popen
        for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
            stream = open(number, mode, errors="backslashreplace" if number == 2 else None, closefd=False)
            stream.reconfigure(line_buffering=number == 2, write_through="PYTHONUNBUFFERED" in environ)
            setattr(sys, name, stream)
        setproctitle.setproctitle(" ".join(argv))
        words = _without_interpreter(argv)
        first_path = {"-c": "", "-m": os.getcwd()}.get(words[0], str(BIN))
        sys.path[:1] = [first_path, *filter(None, environ.get("PYTHONPATH", "").split(":"))]
        importlib.invalidate_caches()
        sys.argv = [words[0], *words[2:]] if words[0] in ("-c", "-m") else words
        program()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(*(socket.socket(fileno=int(number)) for number in sys.argv[1:]))
