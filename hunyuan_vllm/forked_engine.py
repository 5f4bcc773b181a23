"""The engine's process: forked by the API server, which saves importing vLLM a second time, and ended with it

vLLM spawns it on CPUs: a forked process cannot choose how its threads are bound by variables that OpenMP reads once,
and cannot start any if its parent has. `serve` asks for this where the engine has one rank and binds its own threads.
"""

import gc
import multiprocessing
import os
import re
import signal
import socket
import stat
import threading
from contextlib import suppress
from functools import cache
from multiprocessing.context import BaseContext, ForkContext, ForkProcess
from pathlib import Path

import torch

OPENMP = re.compile(r"/\S*/lib(?:gomp|iomp5|omp)\b\S*\.so\S*")
PRIVATE = re.compile(r"/(?!torch\.)[\w-]+\.libs/")  # another package's, under a name of its own


def end_with_parent() -> None:
    """Kill this process once its parent has exited: an API server that is killed cannot end its engine."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def wait_and_kill() -> None:
            parent.join()
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=wait_and_kill, name="parent", daemon=True).start()


class _Engine(ForkProcess):
    def run(self) -> None:
        end_with_parent()
        super().run()


class _Forking(ForkContext):
    Process = _Engine


@cache
def fork_engines() -> None:
    """Have this process, an API server, fork its engine. Called before anything is computed here."""
    from vllm.v1.engine import utils

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP does not survive a fork once it has started threads
    spawning = utils.get_mp_context

    def get_mp_context() -> BaseContext:
        context: BaseContext = spawning()
        return _Forking() if _one_openmp() else context

    def let_go_of_the_parent() -> None:
        signal.set_wakeup_fd(-1)  # a signal must not wake the parent's event loop
        close_server_sockets()
        torch.set_num_threads(threads)
        gc.freeze()  # the child need not look through what the parent made

    os.register_at_fork(after_in_child=let_go_of_the_parent)
    utils.get_mp_context = get_mp_context


def _one_openmp() -> bool:
    """Whether torch and vLLM have the same OpenMP library: of another's threads torch does not know."""
    loaded = set(OPENMP.findall(Path("/proc/self/maps").read_text()))
    return sum(not PRIVATE.search(library) for library in loaded) == 1


def close_server_sockets() -> None:
    """The parent alone listens. Their numbers stay taken: objects that believe to own them are left in the child."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # listdir's own descriptor
            number = int(entry)
            if stat.S_ISSOCK(os.fstat(number).st_mode) and _serves(number):
                os.dup2(nothing, number, inheritable=False)
    os.close(nothing)


def _serves(number: int) -> bool:
    """Whether a socket listens, or is bound and may be told to: vLLM's has its port before the engine starts."""
    with socket.socket(fileno=os.dup(number)) as copy:
        if copy.type != socket.SOCK_STREAM:
            return False
        with suppress(OSError):  # it is not connected
            copy.getpeername()
            return False
        name = copy.getsockname()
        return bool(name if copy.family == socket.AF_UNIX else name[1])
