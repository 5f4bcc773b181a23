"""For tests: an engine's processes are forked, which saves importing vLLM in each of them.

With this directory's parent on PYTHONPATH, and in FORKED_ENGINES how: "fork" from the process that starts them, which
must have computed nothing yet (a server's front end), or "forkserver" from one that has imported vLLM and nothing else.
vLLM spawns them on CPUs, because a forked process cannot choose its OpenMP threads; tests use one thread everywhere.
What such a process was born with is kept from its garbage collector, which vLLM calls nine times in an engine's life.
Ranks sleep after 10 ms without a message, not a second: other tests run meanwhile.
Tests that are about these processes start them as users do.
"""

import gc
import importlib
import multiprocessing
import os
import signal
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkContext, ForkProcess, ForkServerContext, ForkServerProcess
from typing import Any

SHARED = "FORKED_ENGINES_SERVER"  # the variable with a shared server's address
EAGER = "FORKED_ENGINES_EAGER"  # the variable for ranks that compile nothing: vLLM compiles its sampler even if eager
PRELOADED = ["vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner"]


def register() -> None:
    """What vLLM calls for the entry point, before it starts an engine."""
    how = os.environ.get("FORKED_ENGINES")
    if how is None or multiprocessing.get_context is not _original:
        return
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    SpinCondition.__init__.__defaults__ = (0.01,)
    if how == "fork":
        # A signal to the child must not wake the parent's event loop through the socket that both have.
        os.register_at_fork(after_in_child=_forget_the_loop)
        os.register_at_fork(after_in_child=gc.freeze)
        context: Any = _Forking()
    else:
        context = _Context()
        context.set_forkserver_preload(PRELOADED)
        if SHARED in os.environ:
            _join(os.environ[SHARED])
    multiprocessing.get_context = lambda method=None: context if method == "spawn" else _original(method)


def share_server() -> None:
    """Start the fork server for the processes that this one will start, too: it imports vLLM once for all of them."""
    _Context().set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    os.environ[SHARED] = forkserver._forkserver._forkserver_address


def _join(server: str) -> None:
    """Fork from a server that another process has started."""
    ours = forkserver._forkserver
    ours._forkserver_address = server
    ours.ensure_running = resource_tracker.ensure_running
    if ours._forkserver_alive_fd is None:
        ours._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # what a child is given to tell that we are alive


_original = multiprocessing.get_context


def _forget_the_loop() -> None:
    signal.set_wakeup_fd(-1)


class _Forked(ForkProcess):
    def run(self) -> None:
        if self.name.startswith("EngineCore"):  # as where `serve` forks it; several API servers share their sockets
            from hunyuan_vllm.forked_engine import close_server_sockets

            close_server_sockets()
        super().run()


class _Forking(ForkContext):
    Process = _Forked


class _Process(ForkServerProcess):
    """With the environment of the process that starts it, not the one that the server was born with.

    Its own processes come from the same server.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._environ = dict(os.environ)
        forkserver.ensure_running()
        self._server = forkserver._forkserver._forkserver_address

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environ)
        _join(self._server)
        if EAGER in os.environ:
            importlib.import_module("torch._dynamo.config").disable = True
        gc.freeze()
        super().run()


class _Context(ForkServerContext):
    Process = _Process
