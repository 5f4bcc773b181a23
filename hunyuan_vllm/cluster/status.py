"""The cluster that was last started from this machine: its hosts, what runs on each, and what is missing"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from hunyuan_vllm.cluster.connections import Connections
from hunyuan_vllm.cluster.hosts import Host
from hunyuan_vllm.cluster.ray_node import NodeSetup
from hunyuan_vllm.cluster.ray_nodes import RayNode, ask_members
from hunyuan_vllm.cluster.ray_start import RayState
from hunyuan_vllm.ray_environment import NODE_DIRECTORY
from hunyuan_vllm.util.files import write_private
from hunyuan_vllm.util.text import plural, some

STATE = TypeAdapter(RayState)
AGAIN = "run hunyuan-vllm cluster up again"


def record_cluster(hosts: Sequence[Host], python: str, home: Path) -> None:
    """Write down the hosts and their set-up, so that `status` and `down` need no options."""
    values = {
        "hosts": [{"name": host.name, "port": host.port, "user": host.user} for host in hosts],
        "setups": [asdict(host.setup) for host in hosts if host.setup],
        "python": python,
    }
    write_private(home / NODE_DIRECTORY / "cluster.json", json.dumps(values, indent=1))


def recorded_cluster(home: Path) -> tuple[list[Host], str] | None:
    """The hosts, with their set-up, and the Python there; None if there is no record or it is another version's."""
    try:
        values = json.loads((home / NODE_DIRECTORY / "cluster.json").read_text())
        pairs = zip(values["hosts"], values["setups"], strict=True)
        return [Host(**host, setup=NodeSetup(**setup)) for host, setup in pairs], values["python"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_ray(connections: Connections) -> None:
    """Set `ray` of every host that can be reached to what runs there."""

    def read(host: Host) -> None:
        host.ray = STATE.validate_python(connections.ask_ray(host, {"do": "state", "address": host.address}))

    connections.each("reading", connections.usable, read)


def read_status(connections: Connections) -> dict[str, Any]:
    """The cluster's state, as `cluster status --json` prints it. What is missing on a host becomes its problem."""
    read_ray(connections)
    setups = {host: host.setup for host in connections.hosts if host.setup}
    head = next(setup for setup in setups.values() if setup.is_head)
    members, silence = ask_members(head)
    by_address = {member.address: member for member in members}
    nodes: list[dict[str, Any]] = []
    for host, setup in setups.items():
        member = by_address.get(setup.address)
        state = _state(host, setup, member, silence)
        nodes.append({
            "host": host.name,
            "address": setup.address,
            "head": setup.is_head,
            "interface": setup.interface,
            "state": state,
            "gpus": member.gpus if member else 0,
            "free_gpus": member.free_gpus if member else 0,
            "gpus_wanted": setup.gpus,
            "works": host.ray.workloads if host.ray else [],
            "problems": [{"what": problem.text, "remedy": problem.remedy} for problem in host.problems],
        })  # fmt: skip
    totals = {name: sum(node[name] for node in nodes) for name in ("gpus", "free_gpus", "gpus_wanted")}
    whole = not any(host.problems for host in setups)
    return {"whole": whole, "head": head.head, "tls": head.tls is not None, **totals, "nodes": nodes}


def _state(host: Host, setup: NodeSetup, member: RayNode | None, silence: str) -> str:
    """ "running", "stopped", "unreached", or "other" where a Ray runs that is not this cluster's."""
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
