"""Settings every test process needs before vLLM is imported."""

import os
import signal
from collections import defaultdict

import pytest

# One process, so that a test can look into the engine and patch it; TP and PP tests still start their worker processes.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# Ranks on one small machine must not bind to the same cores.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A file's ranks are forked from one process: they need not import vLLM each.
os.environ.setdefault("FORKED_ENGINES", "forkserver")
# Gloo would ask the name server for this machine's name at each start, and wait five seconds where none answers.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A suite that was started in the background would hand its ignoring of Ctrl-C on to programs that are tested for it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that files that run side by side end together."""
    ranks: defaultdict[object, int] = defaultdict(lambda: 3)
    for item in items:
        for rank, mark in enumerate(("slow", "server", "engine")):
            if item.get_closest_marker(mark):
                ranks[item.path] = min(ranks[item.path], rank)
    items.sort(key=lambda item: ranks[item.path])
