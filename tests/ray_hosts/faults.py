"""What can befall a server over two nodes, and what an operator or a service manager does about it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from hosts import Host

from ray_hosts.cluster import RayHosts

__all__ = ["FAULTS", "Fault"]


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


def kill(host: Host, name: str) -> None:
    """kill -9 of the processes whose command line matches the pattern of a shell."""
    host.sh(
        "for folder in /proc/[0-9]*; do "
        "words=$(tr '\\0' ' ' <$folder/cmdline 2>/dev/null) || continue; "
        f'case "$words" in {name}) kill -9 ${{folder#/proc/}} ;; esac; done'
    )


def _plug(cluster: RayHosts) -> float:
    """Ray on a node that was given up ends itself, or is ended; then it joins again."""
    cluster.worker.plug()
    back = time.monotonic()
    cluster.stop(cluster.worker)
    cluster.start(cluster.worker)
    return back


FAULTS = {
    "kill -9 of a worker process": Fault(lambda cluster: kill(cluster.worker, "ray::RayWorkerProc*")),
    "silent partition": Fault(lambda cluster: cluster.worker.unplug(), _plug),
}
