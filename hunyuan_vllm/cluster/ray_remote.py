"""Ray on the hosts of a cluster: read, started and stopped over SSH, and the nodes that the head counts"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hunyuan_vllm.cluster.connections import Connections
from hunyuan_vllm.cluster.hosts import Host, HostError
from hunyuan_vllm.cluster.ray_node import NodeSetup
from hunyuan_vllm.cluster.ray_nodes import RayNode, query_nodes
from hunyuan_vllm.cluster.ray_start import START_TIMEOUT, RayState
from hunyuan_vllm.util.net import why_unreachable

HEAD_TIMEOUT = 40.0  # seconds, with the import of Ray
LIST_NODES = """
import json, sys
from ray.autoscaler.v2.sdk import get_cluster_status
status = get_cluster_status(sys.argv[1], timeout=10)
nodes = []
for node in (*status.active_nodes, *status.idle_nodes):
    usage = node.resource_usage.usage if node.resource_usage else []
    gpus = next((one for one in usage if one.resource_name == "GPU"), None)
    total, used = (int(gpus.total), int(gpus.used)) if gpus else (0, 0)
    nodes.append({"address": node.ip_address, "gpus": total, "free_gpus": total - used})
print("RAY", json.dumps(nodes))
"""


def ask_members(setup: NodeSetup) -> tuple[list[RayNode], str]:
    """The living nodes of the cluster that this node, set up so, is part of; and why there is no answer, or ""."""
    if why := why_unreachable(setup.gcs):
        return [], f"nothing answers at {setup.gcs} ({why})"
    environ = {"PATH": "/usr/bin:/bin", "HOME": "/", **setup.environment()}
    nodes, why = query_nodes(LIST_NODES, setup.gcs, environ, HEAD_TIMEOUT)
    return nodes or [], why


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


class RemoteRay:
    """Each method does one thing on one host, and raises HostError where it fails."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def read(self, host: Host) -> None:
        """Set `host.ray` to what runs there."""
        host.ray = RayState.from_json(self._request(host, {"do": "state", "address": host.address}))

    def request_certificate(self, host: Host) -> str | None:
        """A signing request; None where the host's certificate is valid."""
        assert host.setup is not None
        request: str | None = self._request(host, {"do": "certificate", "setup": host.setup.to_json()})["request"]
        return request

    def start(self, host: Host, token: str, signed: tuple[str, str] | None) -> float:
        """Start Ray, with a certificate and the authority's if `signed` has them; seconds it took."""
        assert host.setup is not None
        request = {"do": "start", "setup": host.setup.to_json(), "token": token}
        if signed:
            request |= {"certificate": signed[0], "authority": signed[1]}
        seconds: float = self._request(host, request, START_TIMEOUT + 30)["seconds"]
        return seconds

    def stop(self, host: Host) -> tuple[list[str], list[str]]:
        """End all of Ray; the processes that ended, and this user's other processes that hold GPU memory."""
        done = self._request(host, {"do": "stop"})
        if done["stuck"]:
            raise HostError(f"these do not end: {', '.join(done['stuck'])}", "a driver holds them: reboot the host")
        return done["ended"], done["on_gpus"]

    def _request(self, host: Host, request: Mapping[str, Any], timeout: float = 60.0) -> dict[str, Any]:
        text = self._connections.run_module(
            host, "hunyuan_vllm.cluster.ray_start", given=json.dumps(request), timeout=timeout
        )
        answer: dict[str, Any] = json.loads(text)
        if "problem" in answer:
            raise HostError(answer["problem"], answer["remedy"])
        return answer
