"""Settings every test process needs before vLLM is imported, and which tests share a process."""

import os
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import forked_engines
import forked_programs
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
# Python programs that are started, not forked, import faster.
FAST_IMPORTS = str(Path(__file__).with_name("fast_imports"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (FAST_IMPORTS, os.environ.get("PYTHONPATH"))))

if os.environ.get("TEST_CPU") == "avx2":  # for a run on a CPU that has more
    import torch

    capabilities = {
        name: there if "avx512" not in name and "amx" not in name else False
        for name, there in torch.cpu.get_capabilities().items()
    }
    torch.cpu.get_capabilities = lambda: capabilities
    torch.cpu._is_avx512_supported = torch.cpu._is_avx512_bf16_supported = lambda: False
    torch.cpu._is_amx_tile_supported = lambda: False

# A suite that was started in the background would hand its ignoring of Ctrl-C on to programs that are tested for it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that use the same server or browser run in the same process, one after the other.
SHARED = {
    "tests/chat/": "chat",
    "tests/server/test_chat_features.py": "keyed server",
    "tests/server/test_served_api_policy.py": "keyed server",
    "tests/server/test_served_bench.py": "keyed server",
    "tests/server/test_served_hostile.py": "keyed server",
}
# The longest file first, then the slow ones, those with a server, those with an engine: the processes end together.
MARKS = {"slow": 1, "server": 2, "engine": 3}
# Not at the same time: each starts Ray on several hosts.
PLACES = {"tests/server/test_ray_serving.py": 0, "tests/cluster/test_cluster_up.py": 2}


def scope(nodeid: str) -> str:
    """What a process runs without a break: a file, or several of `SHARED`."""
    file = nodeid.partition("::")[0]
    return next((shared for prefix, shared in SHARED.items() if file.startswith(prefix)), file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places: defaultdict[str, int] = defaultdict(lambda: len(MARKS) + 1)
    for item in items:
        name = scope(item.nodeid)
        for mark in item.iter_markers():
            places[name] = min(places[name], MARKS.get(mark.name, places[name]))
    places.update(PLACES)
    items.sort(key=lambda item: (places[scope(item.nodeid)], scope(item.nodeid)))


def pytest_configure(config: pytest.Config) -> None:
    """The processes of a parallel run fork programs and engines from the same two servers."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        forked_programs.share_server()
        forked_engines.share_server()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None
