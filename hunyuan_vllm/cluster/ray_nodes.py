"""The nodes of a running Ray cluster, as a query in a process of its own finds them"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hunyuan_vllm.util.net import why_unreachable

if TYPE_CHECKING:
    from hunyuan_vllm.cluster.ray_node import NodeSetup

TIMEOUT = 40.0  # seconds, with the import of Ray
LIST_NODES = """
import json, sys
from ray.autoscaler.v2.sdk import get_cluster_status
status = get_cluster_status(sys.argv[1], timeout=10)
nodes = []
for node in (*status.active_nodes, *status.idle_nodes, *status.failed_nodes):
    usage = node.resource_usage.usage if node.resource_usage else []
    gpus = next((one for one in usage if one.resource_name == "GPU"), None)
    total, used = (int(gpus.total), int(gpus.used)) if gpus else (0, 0)
    alive = node.node_status != "DEAD"
    nodes.append({"address": node.ip_address, "gpus": total, "free_gpus": total - used, "alive": alive})
print("RAY", json.dumps(nodes))
"""


@dataclass(frozen=True)
class RayNode:
    """One node: its GPUs, and the free ones. A node that has left is listed with `alive` false."""

    address: str
    gpus: int
    free_gpus: int
    alive: bool = True


def query_nodes(address: str, environ: Mapping[str, str]) -> tuple[list[RayNode] | None, str]:
    """The nodes of the cluster whose head is at `address`, or None and why there is no answer.

    In a process of its own, because Ray's client keeps threads and sockets, and hangs on a dead address.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", LIST_NODES, address], env=dict(environ), cwd="/",
            capture_output=True, text=True, timeout=TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"no answer in {TIMEOUT:.0f} s"
    for line in done.stdout.splitlines():
        if line.startswith("RAY "):
            return [RayNode(**node) for node in json.loads(line.removeprefix("RAY "))], ""
    return None, (done.stderr.strip().splitlines() or ["no answer"])[-1]


def ask_members(setup: NodeSetup) -> tuple[list[RayNode], str]:
    """The living nodes of the cluster that this node, set up so, is part of; and why there is no answer, or ""."""
    if why := why_unreachable(setup.gcs):
        return [], f"nothing answers at {setup.gcs} ({why})"
    environ = {"PATH": "/usr/bin:/bin", "HOME": "/", **setup.environment()}
    nodes, why = query_nodes(setup.gcs, environ)
    return [node for node in nodes or [] if node.alive], why


def missing_members(setups: Sequence[NodeSetup], members: Sequence[RayNode]) -> list[str]:
    """What the head does not count of these nodes, a line each."""
    by_address = {member.address: member for member in members}
    lines = []
    for setup in setups:
        member = by_address.get(setup.address)
        if member is None:
            lines.append(f"{setup.address}: not among the living nodes")
        elif member.gpus < setup.gpus:
            lines.append(f"{setup.address}: {member.gpus} of {setup.gpus} GPUs")
    return lines
