"""Which nodes a cluster has, as its head says: `python -m hunyuan_vllm.cluster.members HOST:PORT` prints JSON.

Asked in a process of its own, because Ray's client keeps threads, and waits long for a head that is silent.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from hunyuan_vllm.cluster.node_setup import NodeSetup
from hunyuan_vllm.util.net import why_unreachable

__all__ = ["Member", "ask_members"]

ANSWER_TIMEOUT = 10  # seconds, of the head
TIMEOUT = 40.0  # with the import of Ray


@dataclass(frozen=True)
class Member:
    """A node that is alive, by its address, with its GPUs and those that nothing has taken."""

    address: str
    gpus: int
    free_gpus: int


def ask_members(setup: NodeSetup) -> tuple[list[Member], str]:
    """The living nodes of the cluster that this node, set up so, is part of; and why there is no answer, or ""."""
    if why := why_unreachable(setup.gcs):
        return [], f"nothing answers at {setup.gcs} ({why})"
    try:
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, setup.gcs],
            env={"PATH": "/usr/bin:/bin", "HOME": "/", **setup.environment()}, cwd="/",
            capture_output=True, text=True, timeout=TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [], f"no answer in {TIMEOUT:.0f} s"
    for line in done.stdout.splitlines():
        if line.startswith("["):
            return [Member(**member) for member in json.loads(line)], ""
    return [], (done.stderr.strip().splitlines() or ["no answer"])[-1]


def _ask(address: str) -> list[Member]:
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(address, timeout=ANSWER_TIMEOUT)
    members = []
    for node in (*status.active_nodes, *status.idle_nodes):
        usage = node.resource_usage.usage if node.resource_usage else []
        gpus = next((one for one in usage if one.resource_name == "GPU"), None)
        total, used = (int(gpus.total), int(gpus.used)) if gpus else (0, 0)
        members.append(Member(node.ip_address, total, total - used))
    return members


if __name__ == "__main__":
    print(json.dumps([asdict(member) for member in _ask(sys.argv[1])]))
