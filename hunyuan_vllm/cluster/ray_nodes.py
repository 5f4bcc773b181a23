"""The nodes of a running Ray cluster, as a query in a process of its own finds them"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RayNode:
    """One node: its GPUs, and the free ones. A node that has left is listed with `alive` false."""

    address: str
    gpus: int
    free_gpus: int
    alive: bool = True


def query_nodes(
    script: str, address: str, environ: Mapping[str, str], timeout: float
) -> tuple[list[RayNode] | None, str]:
    """The nodes that `script` prints (RAY and their fields as JSON), or None and why there are none.

    In a process of its own, because Ray's client keeps threads and sockets, and hangs on a dead address.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, address], env=dict(environ), cwd="/",
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"no answer in {timeout:.0f} s"
    for line in done.stdout.splitlines():
        if line.startswith("RAY "):
            return [RayNode(**node) for node in json.loads(line.removeprefix("RAY "))], ""
    return None, (done.stderr.strip().splitlines() or ["no answer"])[-1]
