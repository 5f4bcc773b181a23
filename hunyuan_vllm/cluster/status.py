"""`cluster status`: each host of the cluster, what runs there, what the head counts, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from hunyuan_vllm.cluster.logins import Login, Logins
from hunyuan_vllm.cluster.members import Member, ask_members
from hunyuan_vllm.cluster.node_setup import NodeSetup
from hunyuan_vllm.cluster.problems import Problem
from hunyuan_vllm.cluster.ray_node import Looked
from hunyuan_vllm.cluster.record import ClusterRecord
from hunyuan_vllm.cluster.remote_node import RemoteNodes
from hunyuan_vllm.util.text import some

__all__ = ["ClusterStatus", "NodeStatus", "look_at_cluster"]

AGAIN = "run hunyuan-vllm cluster up again"


@dataclass(frozen=True)
class NodeStatus:
    """One host.

    Attributes:
        state: "running", "stopped", "unreached", or "other" where a Ray runs that is not this cluster's.
        gpus, free_gpus: as the head counts them.
        works: what runs on it.
        problems: what keeps it from being whole.
    """

    name: str
    setup: NodeSetup
    state: str
    gpus: int
    free_gpus: int
    works: tuple[str, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class ClusterStatus:
    """All hosts, the head's among them."""

    nodes: tuple[NodeStatus, ...]

    @property
    def whole(self) -> bool:
        return not any(node.problems for node in self.nodes)

    def to_json(self) -> dict[str, Any]:
        return {
            "whole": self.whole,
            "head": self.nodes[0].setup.head,
            "tls": self.nodes[0].setup.tls is not None,
            "gpus": sum(node.gpus for node in self.nodes),
            "free_gpus": sum(node.free_gpus for node in self.nodes),
            "gpus_wanted": sum(node.setup.gpus for node in self.nodes),
            "nodes": [
                {
                    "host": node.name,
                    "address": node.setup.address,
                    "head": node.setup.is_head,
                    "interface": node.setup.interface,
                    "state": node.state,
                    "gpus": node.gpus,
                    "free_gpus": node.free_gpus,
                    "gpus_wanted": node.setup.gpus,
                    "works": list(node.works),
                    "problems": [{"what": problem.what, "remedy": problem.remedy} for problem in node.problems],
                }
                for node in self.nodes
            ],
        }

    def table(self) -> Table:
        """For people."""
        table = Table("host", "interface", "state", "GPUs", "free", "runs")
        for node in self.nodes:
            setup = node.setup
            name = f"{node.name}{' (head)' if setup.is_head else ''}"
            gpus = f"{node.gpus} of {setup.gpus}"
            table.add_row(name, setup.interface, node.state, gpus, str(node.free_gpus), some(node.works) or "nothing")
        return table


def look_at_cluster(record: ClusterRecord, logins: Logins) -> ClusterStatus:
    """Ask every host that can be reached, and the head."""
    nodes, looks = RemoteNodes(logins), dict[str, Looked]()

    def look(login: Login) -> None:
        looks[login.name] = nodes.look(login)

    logins.each("looking", logins.usable, look)
    members, silent = ask_members(next(setup for setup in record.setups if setup.is_head))
    by_name = {host.address: setup for host, setup in zip(record.hosts, record.setups, strict=True)}
    return ClusterStatus(
        tuple(_status(login, by_name[login.name], looks.get(login.name), members, silent) for login in logins.all)
    )


def _status(
    login: Login, setup: NodeSetup, looked: Looked | None, members: Sequence[Member], silent: str
) -> NodeStatus:
    member = next((one for one in members if one.address == setup.address), None)
    problems = list(login.problems)
    if looked is None:
        state = "unreached"
    elif looked.setup is not None and looked.setup.gcs == setup.gcs:
        state = "running"
    else:
        state = "other" if looked.raylets else "stopped"
        text = "another Ray runs there" if looked.raylets else "no Ray runs there"
        if leftovers := not looked.raylets and looked.processes:
            text += f", but processes of one are left: {some(leftovers)}"
        problems.append(Problem(text, AGAIN))
    if state == "running" and member is None:
        text = f"the head gives no answer: {silent}" if silent else "the head does not count it among the living"
        problems.append(Problem(text, AGAIN))
    if member is not None and member.gpus < setup.gpus:
        problems.append(Problem(f"Ray has {member.gpus} GPUs of it, {setup.gpus} are wanted", AGAIN))
    counted = (member.gpus, member.free_gpus) if member else (0, 0)
    works = tuple(looked.works) if looked else ()
    return NodeStatus(login.name, setup, state, *counted, works, tuple(problems))
