"""For tests: an engine's processes are forked, which saves importing vLLM in each of them.

With this directory's parent on PYTHONPATH, and in FORKED_ENGINES how: "fork" from the process that starts them, which
must have computed nothing yet (a server's front end), or "forkserver" from one that has imported vLLM and nothing else.
vLLM spawns them on CPUs, because a forked process cannot choose its OpenMP threads; tests use one thread everywhere.
What such a process was born with is kept from its garbage collector, which vLLM calls nine times in an engine's life.
Tests that are about these processes start them as users do.
"""

import gc
import multiprocessing
import os
import signal
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

__all__ = ["register"]

PRELOADED = ["vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner"]


def register() -> None:
    """What vLLM calls for the entry point, before it starts an engine."""
    how = os.environ.get("FORKED_ENGINES")
    if how is None or multiprocessing.get_context is not _original:
        return
    if how == "fork":
        # A signal to the child must not wake the parent's event loop through the socket that both have.
        os.register_at_fork(after_in_child=_forget_the_loop)
        os.register_at_fork(after_in_child=gc.freeze)
        context: Any = _original("fork")
    else:
        context = _Context()
        context.set_forkserver_preload(PRELOADED)
    multiprocessing.get_context = lambda method=None: context if method == "spawn" else _original(method)


_original = multiprocessing.get_context


def _forget_the_loop() -> None:
    signal.set_wakeup_fd(-1)


class _Process(ForkServerProcess):
    """With the environment of the process that starts it, not the one that the server was born with."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._environ = dict(os.environ)

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environ)
        gc.freeze()
        super().run()


class _Context(ForkServerContext):
    Process = _Process
