"""Whether nodes reach each other's ports: `python -m hunyuan_vllm.cluster.ports`, at both ends, standard library only.

listen ADDRESS SECONDS PORT…    holds what is free of the ports, and one that the system chooses, for so long
connect SECONDS ADDRESS PORT…   connects to each
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

__all__ = ["connect", "listen", "parse_ports"]

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
