"""Whether a Ray cluster is running that this machine belongs to, and how many GPUs it has."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hunyuan_vllm.util.errors import NotYetError, UserError
from hunyuan_vllm.util.net import why_unreachable

__all__ = ["RayCluster", "RayNode", "find_ray_cluster"]

# Ray's client keeps threads and sockets, and hangs on a dead address: ask from a process that can be ended.
PROBE = """
import json, ray, sys
from ray._private.state import available_resources_per_node
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
free = available_resources_per_node()
print("RAY", json.dumps([
    {
        "address": node["NodeManagerAddress"],
        "gpus": int(node["Resources"].get("GPU", 0)),
        "free_gpus": int(free.get(node["NodeID"], {}).get("GPU", 0)),
        "alive": node["Alive"],
    }
    for node in ray.nodes()
]))
"""
TIMEOUT = 60.0


@dataclass(frozen=True)
class RayNode:
    """One node: its GPUs, and those nothing has taken. A node that left is still known, with `alive` false."""

    address: str
    gpus: int
    free_gpus: int
    alive: bool = True


@dataclass(frozen=True)
class RayCluster:
    """A running cluster: how many nodes are alive, their GPUs, and those nothing has taken.

    Attributes:
        members: the nodes themselves, those that left among them; empty where they do not matter.
    """

    nodes: int
    gpus: int
    free_gpus: int
    members: tuple[RayNode, ...] = ()

    @classmethod
    def of(cls, members: Sequence[RayNode]) -> RayCluster:
        """The cluster of these nodes."""
        alive = [node for node in members if node.alive]
        gpus, free = sum(node.gpus for node in alive), sum(node.free_gpus for node in alive)
        return cls(len(alive), gpus, free, tuple(members))


def find_ray_cluster(environ: Mapping[str, str] = os.environ) -> RayCluster | None:
    """The cluster at RAY_ADDRESS, or the one `ray start` noted on this machine; None where neither is there.

    Raises:
        UserError: that is no address, or Ray is not installed.
        NotYetError: no cluster answers at that address. Serving on this machine alone would be a surprise.
    """
    noted = Path(environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    address, remedy = environ.get("RAY_ADDRESS", "").strip(), "unset RAY_ADDRESS"
    if importlib.util.find_spec("ray") is None:
        if address:
            raise UserError(f"RAY_ADDRESS={address} is set, but Ray is not installed: pip install ray, or unset it")
        return None
    if address in ("", "auto"):
        if not noted.exists():
            return None
        address, remedy = noted.read_text().strip(), f"delete {noted}, which names it"
    cluster, cause = _ask(address, environ)
    if cluster is None:
        raise NotYetError(f"no Ray cluster answers at {address} ({cause}): start it, or {remedy}")
    return cluster


def _ask(address: str, environ: Mapping[str, str]) -> tuple[RayCluster | None, str]:
    """The cluster, or None and why."""
    try:
        if why := why_unreachable(address):
            return None, why
        probe = subprocess.run(
            [sys.executable, "-c", PROBE, address], env=dict(environ), capture_output=True, text=True, timeout=TIMEOUT
        )
    except ValueError:
        raise UserError(f"{address} is not the address of a Ray cluster, which is host:port") from None
    except subprocess.TimeoutExpired:
        return None, f"no answer in {TIMEOUT:.0f} s"
    for line in probe.stdout.splitlines():
        if line.startswith("RAY "):
            return RayCluster.of([RayNode(**node) for node in json.loads(line.removeprefix("RAY "))]), ""
    return None, (probe.stderr.strip().splitlines() or ["no answer"])[-1]
