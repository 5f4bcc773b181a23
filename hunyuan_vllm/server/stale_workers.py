"""Kills stale workers on every node of a Ray cluster: those whose raylet has exited, which still hold GPU memory.

Run as a program, as a driver of that cluster.
"""

from collections.abc import Iterable
from contextlib import suppress

import psutil

# How Ray and vLLM title their workers. Once the raylet has exited, init or a user's systemd is their parent.
TITLES = ("ray::", "VLLM::Worker")
RAY_LIBRARY = "/ray/_raylet"  # which every worker of Ray has loaded
EXIT_TIMEOUT = 3.0  # seconds


def kill_stale_workers(among: Iterable[psutil.Process] | None = None) -> list[str]:
    """Kill this user's stale workers, among these processes or all of this machine; a line for each."""
    stale = [process for process in (psutil.process_iter() if among is None else among) if _is_stale(process)]
    killed = []
    for process in stale:
        with suppress(psutil.Error):
            killed.append(f"{process.cmdline()[0].strip()} (pid {process.pid})")
            process.kill()
    psutil.wait_procs(stale, timeout=EXIT_TIMEOUT)
    return killed


def _is_stale(process: psutil.Process) -> bool:
    try:
        parent = process.parent()
        return (
            process.uids().real == psutil.Process().uids().real
            and " ".join(process.cmdline()).startswith(TITLES)
            and (parent is None or parent.pid == 1 or parent.name() == "systemd")
            and any(RAY_LIBRARY in file.path for file in process.memory_maps())
        )
    except psutil.Error:
        return False


def _main() -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    task = ray.remote(num_cpus=0, max_retries=0)(kill_stale_workers)
    calls = {}
    for node in ray.nodes():
        if node["Alive"]:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            calls[task.options(scheduling_strategy=here).remote()] = node["NodeManagerAddress"]
    finished, _ = ray.wait(list(calls), num_returns=len(calls), timeout=30)
    for call in finished:
        with suppress(ray.exceptions.RayError):
            for line in ray.get(call):
                print(f"KILLED {line} on {calls[call]}")


if __name__ == "__main__":
    _main()
