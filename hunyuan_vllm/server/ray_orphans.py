"""Ends workers of Ray that outlived their raylet, on every node of the cluster: they hold GPU memory for nobody.

Run as a program, as a driver of that cluster.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import psutil

__all__ = ["end_orphans"]

# Ray and vLLM name their workers so; and init, or a user's systemd, is the parent of those whose raylet is gone.
TITLES = ("ray::", "VLLM::Worker")
NATIVE = "/ray/_raylet"  # the library that a process of Ray's has loaded
LAST_WORDS = 3.0  # seconds


def end_orphans(among: Iterable[psutil.Process] | None = None) -> list[str]:
    """End this user's orphaned workers, of these processes or of all on this machine, and say which they were."""
    orphans = [process for process in (psutil.process_iter() if among is None else among) if _is_orphan(process)]
    ended = []
    for process in orphans:
        with suppress(psutil.Error):
            ended.append(f"{process.cmdline()[0].strip()} (pid {process.pid})")
            process.kill()
    psutil.wait_procs(orphans, timeout=LAST_WORDS)
    return ended


def _is_orphan(process: psutil.Process) -> bool:
    try:
        parent = process.parent()
        return (
            process.uids().real == psutil.Process().uids().real
            and " ".join(process.cmdline()).startswith(TITLES)
            and (parent is None or parent.pid == 1 or parent.name() == "systemd")
            and any(NATIVE in file.path for file in process.memory_maps())
        )
    except psutil.Error:
        return False


def _main() -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    task = ray.remote(num_cpus=0, max_retries=0)(end_orphans)
    calls = {}
    for node in ray.nodes():
        if node["Alive"]:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            calls[task.options(scheduling_strategy=here).remote()] = node["NodeManagerAddress"]
    finished, _ = ray.wait(list(calls), num_returns=len(calls), timeout=30)
    for call in finished:
        with suppress(ray.exceptions.RayError):
            for line in ray.get(call):
                print(f"ENDED {line} on {calls[call]}")


if __name__ == "__main__":
    _main()
