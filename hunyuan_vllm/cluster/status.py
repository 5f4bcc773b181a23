"""The cluster that was last started from this machine: its hosts, what runs on each, and what is missing"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from hunyuan_vllm.cluster.connections import Connections
from hunyuan_vllm.cluster.hosts import Host
from hunyuan_vllm.cluster.ray_node import NodeSetup
from hunyuan_vllm.cluster.ray_nodes import RayNode
from hunyuan_vllm.cluster.ray_remote import RemoteRay, ask_members
from hunyuan_vllm.ray_environment import NODE_FOLDER
from hunyuan_vllm.util.files import write_private
from hunyuan_vllm.util.text import plural, some

AGAIN = "run hunyuan-vllm cluster up again"


def record_cluster(hosts: Sequence[Host], python: str, home: Path) -> None:
    """Write down the hosts and their set-up, so that `status` and `down` need no options."""
    values = {
        "hosts": [{"name": host.name, "port": host.port, "user": host.user} for host in hosts],
        "setups": [host.setup.to_json() for host in hosts if host.setup],
        "python": python,
    }
    write_private(home / NODE_FOLDER / "cluster.json", json.dumps(values, indent=1))


def recorded_cluster(home: Path) -> tuple[list[Host], str] | None:
    """The hosts, with their set-up, and the Python there; None if there is no record or it is another version's."""
    try:
        values = json.loads((home / NODE_FOLDER / "cluster.json").read_text())
        pairs = zip(values["hosts"], values["setups"], strict=True)
        return [Host(**host, setup=NodeSetup(**setup)) for host, setup in pairs], values["python"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


@dataclass(frozen=True)
class NodeStatus:
    """One host; its problems are the host's.

    Attributes:
        state: "running", "stopped", "unreached", or "other" where a Ray runs that is not this cluster's.
        member: as the head counts it; None where it does not.
    """

    host: Host
    setup: NodeSetup
    state: str
    member: RayNode | None

    @property
    def gpus(self) -> int:
        return self.member.gpus if self.member else 0

    @property
    def free_gpus(self) -> int:
        return self.member.free_gpus if self.member else 0

    @property
    def workloads(self) -> list[str]:
        return self.host.ray.workloads if self.host.ray else []

    def to_json(self) -> dict[str, Any]:
        return {
            "host": self.host.name,
            "address": self.setup.address,
            "head": self.setup.is_head,
            "interface": self.setup.interface,
            "state": self.state,
            "gpus": self.gpus,
            "free_gpus": self.free_gpus,
            "gpus_wanted": self.setup.gpus,
            "works": self.workloads,
            "problems": [{"what": problem.text, "remedy": problem.remedy} for problem in self.host.problems],
        }


@dataclass(frozen=True)
class ClusterStatus:
    """All hosts, the head's among them."""

    nodes: tuple[NodeStatus, ...]

    @property
    def whole(self) -> bool:
        return not any(node.host.problems for node in self.nodes)

    def to_json(self) -> dict[str, Any]:
        setup = self.nodes[0].setup
        return {
            "whole": self.whole,
            "head": setup.head,
            "tls": setup.tls is not None,
            "gpus": sum(node.gpus for node in self.nodes),
            "free_gpus": sum(node.free_gpus for node in self.nodes),
            "gpus_wanted": sum(node.setup.gpus for node in self.nodes),
            "nodes": [node.to_json() for node in self.nodes],
        }

    def table(self) -> Table:
        table = Table("host", "interface", "state", "GPUs", "free", "runs")
        for node in self.nodes:
            name = f"{node.host}{' (head)' if node.setup.is_head else ''}"
            gpus = f"{node.gpus} of {node.setup.gpus}"
            runs = some(node.workloads) or "nothing"
            table.add_row(name, node.setup.interface, node.state, gpus, str(node.free_gpus), runs)
        return table


def read_status(connections: Connections) -> ClusterStatus:
    """Ask every host that can be reached, and the head."""
    connections.each("reading", connections.usable, RemoteRay(connections).read)
    setups = [host.setup for host in connections.hosts if host.setup]
    members, silence = ask_members(next(setup for setup in setups if setup.is_head))
    by_address = {member.address: member for member in members}
    return ClusterStatus(
        tuple(
            NodeStatus(host, setup, _state(host, setup, by_address.get(setup.address), silence),
                       by_address.get(setup.address))
            for host, setup in zip(connections.hosts, setups, strict=True)
        )
    )  # fmt: skip


def _state(host: Host, setup: NodeSetup, member: RayNode | None, silence: str) -> str:
    """The host's state; what is missing becomes one of its problems."""
    ray = host.ray
    if ray is None:
        state = "unreached"
    elif ray.setup is not None and ray.setup.gcs == setup.gcs:
        state = "running"
        if member is None:
            host.problem(f"the head does not answer: {silence}" if silence else "the head does not count it", AGAIN)
    elif ray.raylets:
        state = "other"
        host.problem("another Ray runs there", AGAIN)
    else:
        state = "stopped"
        left = f", but processes of an earlier one are left: {some(ray.processes)}" if ray.processes else ""
        host.problem(f"no Ray runs there{left}", AGAIN)
    if member is not None and member.gpus < setup.gpus:
        host.problem(f"Ray has {plural(member.gpus, 'GPU')} of it, and should have {setup.gpus}", AGAIN)
    return state
