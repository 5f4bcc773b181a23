"""Which nodes a run is on, and how many processes each has, from the published script's variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

from hunyuan_vllm.cluster.hosts import normalise_address
from hunyuan_vllm.errors import UserError

__all__ = ["NodeOfRun", "carrying", "read_nodes"]

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class NodeOfRun:
    """One node: its address, and one process for each of its GPUs."""

    address: str
    processes: int


def read_nodes(
    environ: Mapping[str, str], count_gpus: Callable[[], int], own: Mapping[str, str] | None = None
) -> tuple[list[NodeOfRun], int]:
    """The nodes, this one first, and the port at which their processes meet.

    HOST_GPU_NUM is how many processes a node has (default: its GPUs, at least one); NODE_IP_LIST, "ip1:8,ip2:8", the
    nodes and how many each has; LOCAL_IP, which of them this one is (default: the one with an address of this machine);
    NODES and NODE_NUM, of nodes and of processes in all, are only checked; MASTER_PORT is the port.

    Args:
        count_gpus: asked where HOST_GPU_NUM is not set.
        own: address → interface of this machine; looked up where it is not given.

    Raises:
        UserError: a variable means nothing, or does not fit the others.
    """
    each = _number(environ, "HOST_GPU_NUM")
    port = _number(environ, "MASTER_PORT") or DEFAULT_PORT
    words = [word for word in environ.get("NODE_IP_LIST", "").replace(",", " ").split() if word]
    nodes = [_node(word, each) for word in words]
    addresses = [node.address for node in nodes]
    if len(set(addresses)) < len(addresses):
        raise UserError(f"NODE_IP_LIST={environ['NODE_IP_LIST']} names a node twice")
    if len(nodes) > 1:
        nodes.insert(0, nodes.pop(_place_of_this(environ, addresses, own)))
    elif not nodes:
        nodes = [NodeOfRun("127.0.0.1", each or max(count_gpus(), 1))]
    for name, counted in (("NODES", len(nodes)), ("NODE_NUM", sum(node.processes for node in nodes))):
        said = _number(environ, name)
        if said is not None and said != counted and (words or said != 1):
            raise UserError(f"{name}={said}, and NODE_IP_LIST has {counted}: make them agree, or unset {name}")
    return nodes, port


def carrying(address: str, own: Mapping[str, str] | None = None) -> str | None:
    """The network interface of this machine that has `address`."""
    return (_own_addresses() if own is None else own).get(address)


def _node(word: str, each: int | None) -> NodeOfRun:
    address, colon, slots = word.rpartition(":")
    if not colon or not slots.isdigit() or not 1 <= int(slots) <= 64:
        raise UserError(f"NODE_IP_LIST: {word} is not ADDRESS:GPUS, such as 10.0.0.1:8")
    if each is not None and each != int(slots):
        raise UserError(f"HOST_GPU_NUM={each}, and NODE_IP_LIST says {word}: make them agree, or unset HOST_GPU_NUM")
    return NodeOfRun(normalise_address(address), int(slots))


def _place_of_this(environ: Mapping[str, str], addresses: list[str], own: Mapping[str, str] | None) -> int:
    if local := environ.get("LOCAL_IP", "").strip():
        if normalise_address(local) not in addresses:
            raise UserError(f"LOCAL_IP={local} is not in NODE_IP_LIST ({', '.join(addresses)})")
        return addresses.index(normalise_address(local))
    have = _own_addresses() if own is None else own
    for place, address in enumerate(addresses):
        if address in have:
            return place
    raise UserError("no node of NODE_IP_LIST has an address of this machine: set LOCAL_IP to this node's")


def _number(environ: Mapping[str, str], name: str) -> int | None:
    raw = environ.get(name, "").strip()
    if not raw:
        return None
    if not raw.isdigit() or int(raw) < 1:
        raise UserError(f"{name}={raw} is not a number of at least 1")
    return int(raw)


def _own_addresses() -> dict[str, str]:
    return {entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries}
