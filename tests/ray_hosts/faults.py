"""What can befall a server over two nodes, and what an operator or a service manager does about it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from hosts import Host

from ray_hosts.cluster import RayHosts

PAUSE = 15.0  # seconds; Ray's head gives a node up after 25


@dataclass(frozen=True)
class Fault:
    """One kind.

    Attributes:
        strike: makes it happen.
        repair: brings back what was lost, but for the server; returns the moment from which it was back, by the
            monotonic clock: a host as soon as it can be reached, before Ray is on it.
    """

    strike: Callable[[RayHosts], None]
    repair: Callable[[RayHosts], float] = lambda cluster: time.monotonic()


def kill(host: Host, name: str, signal: str = "KILL") -> None:
    """Signal the processes whose command line matches the pattern of a shell."""
    host.sh(
        "for entry in /proc/[0-9]*; do [ $entry != /proc/$$ ] || continue; "  # the pattern is in its own command line
        "words=$(tr '\\0' ' ' <$entry/cmdline 2>/dev/null) || continue; "
        f'case "$words" in {name}) kill -{signal} ${{entry#/proc/}} ;; esac; done'
    )


def pause_raylet_in_load(cluster: RayHosts) -> float:
    """After a worker process was killed: the next one is about to load the model when its raylet falls silent."""
    back = time.monotonic()
    words = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'"
    cluster.worker.sh(f"until {words} | grep -q '^ray::RayWorkerProc'; do sleep 0.2; done", timeout=180)
    kill(cluster.worker, "*/raylet/raylet*", "STOP")
    time.sleep(PAUSE)
    kill(cluster.worker, "*/raylet/raylet*", "CONT")
    return back


def _restart_ray(*hosts: Callable[[RayHosts], Host]) -> Callable[[RayHosts], float]:
    """Ray is back once it is asked for: what is left of it ends itself, or is ended first."""

    def restart(cluster: RayHosts) -> float:
        back = time.monotonic()
        for host in hosts:
            cluster.stop(host(cluster))
        for host in hosts:
            cluster.start(host(cluster))
        return back

    return restart


def _head(cluster: RayHosts) -> Host:
    return cluster.head


def _worker(cluster: RayHosts) -> Host:
    return cluster.worker


def _plug(cluster: RayHosts) -> float:
    cluster.worker.plug()
    return _restart_ray(_worker)(cluster)


def _boot(cluster: RayHosts) -> float:
    cluster.worker = cluster.network.add("worker")
    return _restart_ray(_worker)(cluster)


FAULTS = {
    "kill -9 of a worker process": Fault(lambda cluster: kill(cluster.worker, "ray::RayWorkerProc*")),
    "kill -9 of the worker's raylet": Fault(
        lambda cluster: kill(cluster.worker, "*/raylet/raylet*"), _restart_ray(_worker)
    ),
    "kill -9 of the API server": Fault(lambda cluster: kill(cluster.head, "*.vllm_serve\\ serve*")),
    "kill -9 of the head's Ray": Fault(
        lambda cluster: kill(cluster.head, "*/gcs_server*|*/raylet/raylet*"), _restart_ray(_head, _worker)
    ),
    "silent partition": Fault(lambda cluster: cluster.worker.unplug(), _plug),
    "power-off of the worker's host": Fault(lambda cluster: cluster.worker.power_off(), _boot),
}
