"""Ray's fixed ports, and whether hosts reach each other on them"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass


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


MOST = 256


def parse_ports(text: str) -> list[int]:
    """The ports in a list like "6379,20000-20003", each once.

    Raises:
        ValueError: it is something else, or too many.
    """
    ports: dict[int, None] = {}
    for part in filter(None, text.replace(" ", ",").split(",")):
        first, dash, last = part.partition("-")
        try:
            span = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            span = range(0)
        if not span or span[0] < 1 or span[-1] > 65535 or len(span) > MOST:
            raise ValueError(f"{part} is not a port, nor a range of up to {MOST}")
        ports |= dict.fromkeys(span)
    return list(ports)


def listen(address: str, seconds: int, ports: Sequence[int]) -> dict[str, object]:
    """Hold the ports in a process of its own, which ends by itself; connections are the kernel's to accept.

    Returns:
        "pid" of that process; "held", the ports it has, of which the last was not asked for; "taken", those that
        another program has.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    held, taken = [], []
    for port in [*ports, 0]:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
            listener.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            taken.append(port)
        else:
            held.append(listener)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(nothing, descriptor)
        signal.alarm(seconds)  # whose default action is the end
        while True:
            signal.pause()
    return {"pid": pid, "held": [listener.getsockname()[1] for listener in held], "taken": taken}


def connect(seconds: float, address: str, ports: Sequence[int]) -> dict[int, str]:
    """Port → why it was not reached; those that were are left out."""

    def attempt(port: int) -> str:
        try:
            socket.create_connection((address, port), seconds).close()
        except TimeoutError:
            return "no answer"
        except OSError as error:
            return error.strerror or str(error)
        return ""

    with ThreadPoolExecutor(min(len(ports), 32)) as pool:
        return {port: why for port, why in zip(ports, pool.map(attempt, ports), strict=True) if why}


def _main(side: str, *arguments: str) -> None:
    if side == "listen":
        result: object = listen(arguments[0], int(arguments[1]), [int(port) for port in arguments[2:]])
    else:
        result = connect(float(arguments[0]), arguments[1], [int(port) for port in arguments[2:]])
    print(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
