"""The Ray cluster that this machine belongs to: its free GPUs, the wait for them, and stale workers"""

import importlib.util
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from hunyuan_vllm.cluster.processes import end_processes
from hunyuan_vllm.cluster.ray_nodes import RayNode, query_nodes
from hunyuan_vllm.ray_environment import current_cluster_file
from hunyuan_vllm.server.process import Stop, notify_systemd
from hunyuan_vllm.util.errors import NotYetError, UserError
from hunyuan_vllm.util.net import why_unreachable
from hunyuan_vllm.util.streams import say
from hunyuan_vllm.util.text import duration

KILL_TIMEOUT = 60.0  # seconds in which stale workers are killed
POLL_PERIOD = 2.0  # seconds between two queries, each of which takes some itself
LOG_PERIOD = 30.0  # seconds after which a log repeats an unchanged state
NO_CLUSTER = "no Ray cluster is running here"
START = "start it on this node (sh deploy/ray_head.sh), or on all at once (hunyuan-vllm cluster up)"


@dataclass(frozen=True)
class RayCluster:
    """A running cluster; `members` are its nodes, with those that have left."""

    members: Sequence[RayNode]

    @property
    def alive(self) -> list[RayNode]:
        return [node for node in self.members if node.alive]

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.alive)

    @property
    def free_gpus(self) -> int:
        return sum(node.free_gpus for node in self.alive)


def find_ray_cluster(environ: Mapping[str, str] = os.environ) -> RayCluster | None:
    """The cluster at RAY_ADDRESS, else the one that `ray start` recorded on this machine; None without either."""
    record = current_cluster_file(environ)
    address, remedy = environ.get("RAY_ADDRESS", "").strip(), "unset RAY_ADDRESS"
    if importlib.util.find_spec("ray") is None:
        if address:
            raise UserError(f"RAY_ADDRESS={address} is set, but Ray is not installed: pip install ray, or unset it")
        return None
    if address in ("", "auto"):
        if not record.exists():
            return None
        address, remedy = record.read_text().strip(), f"delete {record}, which names it"
    try:
        why = why_unreachable(address)
    except ValueError:
        raise UserError(f"{address} is not the address of a Ray cluster, which is host:port") from None
    nodes, why = (None, why) if why else query_nodes(address, environ)
    if nodes is None:  # serving on this machine alone instead would be a surprise
        raise NotYetError(f"no Ray cluster answers at {address} ({why}): start it, or {remedy}")
    return RayCluster(nodes)


def wait_for_gpus(
    needed: int,
    environ: Mapping[str, str],
    limit: float | None = None,
    expected: Sequence[str] = (),
    stop: Stop | None = None,
    find: Callable[[Mapping[str, str]], RayCluster | None] = find_ray_cluster,
) -> None:
    """Return once that many GPUs are free in the cluster, or once `stop` is requested; say meanwhile what is missing.

    Args:
        limit: seconds to wait at most; None waits for ever.
        expected: addresses of the nodes that should join, if they are known.
    """
    deadline = math.inf if limit is None else time.monotonic() + limit
    logged, logged_at = "", 0.0
    while stop is None or not stop.requested:
        free, lines = _free_gpus(needed, environ, expected, find)
        if free >= needed:
            if logged:
                say(f"all {needed} GPUs are free")
            return
        now = time.monotonic()
        if now >= deadline:
            raise NotYetError(
                f"{needed} GPUs are needed and {free} are free in Ray after {limit:g} s: {'; '.join(lines)}. Set "
                "TP_SIZE for fewer, or GPU_WAIT for longer (seconds)"
            )
        head = f"hunyuan-vllm: waiting for GPUs in Ray: {free} of {needed} are free"
        notify_systemd("WATCHDOG=1", f"STATUS={head.partition(': ')[2]}; {'; '.join(lines)}")
        text = "\n  ".join([head, *lines])
        if text != logged or now - logged_at >= LOG_PERIOD:
            left = [] if limit is None else [f"giving up in {duration(max(int(deadline - now), 0))}"]
            print(head if text == logged else text, *left, sep="\n  ", file=sys.stderr, flush=True)
            logged, logged_at = text, now
        until = min(now + POLL_PERIOD, deadline)
        while (now := time.monotonic()) < until and not (stop and stop.requested):
            time.sleep(min(0.5, until - now))


def describe_nodes(cluster: RayCluster | None, expected: Sequence[str] = ()) -> list[str]:
    """One line for each node: its GPUs, or that it is missing and what to do."""
    if cluster is None:
        return [f"{NO_CLUSTER}: {START}"]
    here = {node.address for node in cluster.alive}
    lines = [
        f"{node.address} has {node.free_gpus} of its {node.gpus} GPUs free"
        + ("" if node.free_gpus == node.gpus else ": another Ray program uses the others")
        for node in cluster.alive
    ]
    gone = dict.fromkeys(node.address for node in cluster.members if not node.alive and node.address not in here)
    lines += [f"{address} has left: restart Ray there (sh deploy/ray_worker.sh HEAD_IP)" for address in gone]
    absent = [address for address in expected if address not in here and address not in gone]
    return lines + [f"{address} has not joined: run sh deploy/ray_worker.sh HEAD_IP there" for address in absent]


def _free_gpus(
    needed: int,
    environ: Mapping[str, str],
    expected: Sequence[str],
    find: Callable[[Mapping[str, str]], RayCluster | None],
) -> tuple[int, list[str]]:
    """The free GPUs, and lines about what is missing."""
    try:
        cluster = find(environ)
    except UserError as error:
        return 0, [str(error)]
    lines = describe_nodes(cluster, expected)
    if cluster is None:
        return 0, lines
    if cluster.gpus < needed and len(lines) == len(cluster.alive):
        lines.append(f"nodes with {needed - cluster.gpus} more GPUs have not joined: sh deploy/ray_worker.sh HEAD_IP")
    return cluster.free_gpus, lines


def kill_stale_workers(environ: Mapping[str, str]) -> list[str]:
    """Kill workers whose raylet has exited, on every node of the cluster; a line for each. Never raises.

    Ray itself ends the workers of a driver that exits, but not those that a raylet leaves behind.
    """
    command = [sys.executable, "-m", "hunyuan_vllm.server.ray_cluster"]
    try:
        done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=KILL_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.removeprefix("KILLED ") for line in done.stdout.splitlines() if line.startswith("KILLED ")]


# How Ray and vLLM title their workers. Once the raylet has exited, init or a user's systemd is their parent.
TITLES = ("ray::", "VLLM::Worker")
RAY_LIBRARY = "/ray/_raylet"  # which every worker of Ray has loaded


def kill_workers_here(among: Sequence[psutil.Process] | None = None) -> list[str]:
    """Kill this user's stale workers, among these processes or all of this machine; a line for each."""

    def stale_workers() -> list[psutil.Process]:
        return [process for process in (psutil.process_iter() if among is None else among) if _is_stale(process)]

    ended, _ = end_processes(stale_workers)
    return ended


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
    """Kill them on every node, as a driver of the cluster."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    task = ray.remote(num_cpus=0, max_retries=0)(kill_workers_here)
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
