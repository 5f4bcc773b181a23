"""The ports of a cluster: each that listens where other hosts can reach it, what it is for and what guards it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GCS_PORT", "TABLE", "Port", "checked_ports", "fixed_ports", "ray_flags", "worker_ports"]


@dataclass(frozen=True)
class Port:
    """One port, or a range of them.

    Attributes:
        name: as documents call it.
        first, last: the same number for a single port.
        flag: of `ray start`; for a range the flags of its ends, with a comma between.
        guard: what a stranger who reaches it needs: "token", or "nothing".
        purpose: what it is for.
        head_only: whether only the head listens on it.
        extra: whether it is open only where the extra `ray[default]` is installed, which nothing here needs.
    """

    name: str
    first: int
    last: int
    flag: str
    guard: str
    purpose: str
    head_only: bool = False
    extra: bool = False

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


GCS_PORT = 6379
# Below the ports that Linux gives to outgoing connections (32768 and up), so that none is ever taken by chance.
TABLE = (
    Port("GCS", GCS_PORT, GCS_PORT, "--port", "token", "nodes and drivers join here", head_only=True),
    Port("node manager", 6380, 6380, "--node-manager-port", "token", "the raylet: starts and watches workers"),
    Port("object manager", 6381, 6381, "--object-manager-port", "token", "objects go from node to node"),
    Port("runtime env agent", 6382, 6382, "--runtime-env-agent-port", "token", "prepares the environment of workers"),
    Port("dashboard agent", 6383, 6383, "--dashboard-agent-grpc-port", "token", "figures of workers", extra=True),
    Port("dashboard agent HTTP", 6384, 6384, "--dashboard-agent-listen-port", "token", "state of the node", extra=True),
    Port("metrics", 6385, 6385, "--metrics-export-port", "nothing", "Prometheus reads the node's figures", extra=True),
    Port("workers", 6400, 6655, "--min-worker-port,--max-worker-port", "token", "each worker and driver has one"),
)


def ray_flags(head: bool) -> list[str]:
    """The flags of `ray start` that fix the ports."""
    flags = []
    for port in TABLE:
        if head or not port.head_only:
            ends = (port.first, port.last)
            flags += [f"{flag}={number}" for flag, number in zip(port.flag.split(","), ends, strict=False)]
    return flags


def fixed_ports(head: bool) -> dict[int, Port]:
    """The single ports of a node, which must be free before Ray starts there."""
    return {port.first: port for port in TABLE if port.first == port.last and (head or not port.head_only)}


def worker_ports() -> range:
    """The range from which workers take theirs."""
    workers = TABLE[-1]
    return range(workers.first, workers.last + 1)


def checked_ports() -> list[int]:
    """Those that a check tries: the single ones, and the ends of the range."""
    return [*fixed_ports(head=True), worker_ports()[0], worker_ports()[-1]]
