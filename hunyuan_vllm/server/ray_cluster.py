"""Whether a Ray cluster is running that this machine belongs to, and how many GPUs it has."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hunyuan_vllm.errors import UserError

__all__ = ["RayCluster", "find_ray_cluster"]

# Ray's client keeps threads and sockets, and hangs on a dead address: ask from a process that can be ended.
PROBE = """
import json, ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
nodes = [node for node in ray.nodes() if node["Alive"]]
print("RAY", json.dumps({
    "nodes": len(nodes),
    "gpus": int(sum(node["Resources"].get("GPU", 0) for node in nodes)),
    "free_gpus": int(ray.available_resources().get("GPU", 0)),
}))
"""
TIMEOUT = 60.0


@dataclass(frozen=True)
class RayCluster:
    """A running cluster: how many nodes are alive, their GPUs, and those nothing has taken."""

    nodes: int
    gpus: int
    free_gpus: int


def find_ray_cluster(environ: Mapping[str, str] = os.environ) -> RayCluster | None:
    """The cluster at RAY_ADDRESS, or the one `ray start` noted on this machine; None where there is none.

    Raises:
        UserError: RAY_ADDRESS is set and no cluster answers there.
    """
    address = environ.get("RAY_ADDRESS")
    noted = Path(environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    if importlib.util.find_spec("ray") is None:
        if address:
            raise UserError(f"RAY_ADDRESS={address} is set, but Ray is not installed: pip install ray, or unset it")
        return None
    if not address and not noted.exists():
        return None
    try:
        probe = subprocess.run(
            [sys.executable, "-c", PROBE], env=dict(environ), capture_output=True, text=True, timeout=TIMEOUT
        )
        answers = [line.removeprefix("RAY ") for line in probe.stdout.splitlines() if line.startswith("RAY ")]
        cause = (probe.stderr.strip().splitlines() or ["no answer"])[-1]
    except subprocess.TimeoutExpired:
        answers, cause = [], f"no answer in {TIMEOUT:.0f} s"
    if answers:
        return RayCluster(**json.loads(answers[0]))
    if address:
        raise UserError(f"no Ray cluster answers at RAY_ADDRESS={address} ({cause}): start it, or unset RAY_ADDRESS")
    return None
