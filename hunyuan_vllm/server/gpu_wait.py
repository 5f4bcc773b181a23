"""Waits until the Ray cluster has the GPUs that a server needs, and says which nodes and GPUs are missing.

vLLM would wait for half an hour without a word of it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hunyuan_vllm.errors import NotYetError, UserError
from hunyuan_vllm.server.ray_cluster import RayCluster, find_ray_cluster

__all__ = ["describe", "wait_for_gpus"]

PERIOD = 2.0  # seconds between two looks at the cluster, each of which takes some itself
REMINDER = 30.0  # seconds between two lines in a log that say the same
NO_CLUSTER = "no Ray cluster is running here"
START = "start it on this node (sh deploy/ray_head.sh), or on all at once (hunyuan-vllm cluster up)"


class Stopping(Protocol):
    """Says whether the operator wants no more."""

    @property
    def requested(self) -> bool: ...


def wait_for_gpus(
    needed: int,
    environ: Mapping[str, str],
    limit: float,
    expected: Sequence[str] = (),
    stop: Stopping | None = None,
    find: Callable[[Mapping[str, str]], RayCluster | None] = find_ray_cluster,
    stream: TextIO | None = None,
) -> None:
    """Return once so many GPUs are free in the cluster, or once `stop` is requested.

    Args:
        needed: GPUs.
        environ: says where the cluster is.
        limit: seconds to wait at most.
        expected: addresses of the nodes that are to be there, where they are known.
        stream: where it says what it waits for; None is standard error.

    Raises:
        NotYetError: they are not there in that time; the message says what is missing.
    """
    console = Console(file=stream or sys.stderr, highlight=False)
    deadline = time.monotonic() + limit
    said: tuple[str, float] = ("", 0.0)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while stop is None or not stop.requested:
            free, lines = _look(needed, environ, expected, find)
            if free >= needed:
                if said[0]:
                    console.print(f"hunyuan-vllm: all {needed} GPUs are there", soft_wrap=True)
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise NotYetError(
                    f"{needed} GPUs are needed and {free} are free in Ray after {limit:g} s: {'; '.join(lines)}. Set "
                    "TP_SIZE for fewer, or GPU_WAIT for longer (seconds)"
                )
            head = f"hunyuan-vllm: waiting for GPUs in Ray: {free} of {needed} are free"
            said = _say(live, head, lines, left, said)
            _count_down(live, head, lines, min(deadline, time.monotonic() + PERIOD), deadline, stop)


def describe(cluster: RayCluster | None, expected: Sequence[str] = ()) -> list[str]:
    """One line for each node: what it has, or that it is missing and what to do."""
    if cluster is None:
        return [f"{NO_CLUSTER}: {START}"]
    here = {node.address for node in cluster.members if node.alive}
    lines = [
        f"{node.address} has {node.free_gpus} of its {node.gpus} GPUs free"
        + ("" if node.free_gpus == node.gpus else ": another program of Ray holds the rest")
        for node in cluster.members
        if node.alive
    ]
    gone = dict.fromkeys(node.address for node in cluster.members if not node.alive and node.address not in here)
    lines += [f"{address} has left: start Ray there again (sh deploy/ray_worker.sh HEAD_IP)" for address in gone]
    absent = [address for address in expected if address not in here and address not in gone]
    return lines + [f"{address} has not joined: run sh deploy/ray_worker.sh HEAD_IP there" for address in absent]


def _look(
    needed: int,
    environ: Mapping[str, str],
    expected: Sequence[str],
    find: Callable[[Mapping[str, str]], RayCluster | None],
) -> tuple[int, list[str]]:
    """GPUs that are free, and the lines about what is missing."""
    try:
        cluster = find(environ)
    except UserError as error:
        return 0, [str(error)]
    lines = describe(cluster, expected)
    if cluster is None:
        return 0, lines
    if cluster.gpus < needed and len(lines) == cluster.nodes:
        lines.append(f"nodes with {needed - cluster.gpus} more GPUs have not joined: sh deploy/ray_worker.sh HEAD_IP")
    return cluster.free_gpus, lines


def _say(live: Live, head: str, lines: Sequence[str], left: float, said: tuple[str, float]) -> tuple[str, float]:
    """In a log: all of it when it has changed, one line now and then while it has not."""
    text, now = "\n  ".join([head, *lines]), time.monotonic()
    if text == said[0] and now - said[1] < REMINDER:
        return said
    if not live.console.is_terminal:
        live.console.print(
            head if text == said[0] else text, f"  giving up in {_clock(left)}", sep="\n", soft_wrap=True
        )
    return text, now


def _count_down(
    live: Live, head: str, lines: Sequence[str], until: float, deadline: float, stop: Stopping | None
) -> None:
    while (now := time.monotonic()) < until and not (stop and stop.requested):
        if live.console.is_terminal:
            live.update(Text("\n  ".join([head, *lines, f"giving up in {_clock(deadline - now)}"])), refresh=True)
        time.sleep(min(0.5, until - now))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
