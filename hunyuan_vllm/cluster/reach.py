"""Whether anything listens at a Ray cluster's address, found out before Ray's own client, which tries for long."""

from __future__ import annotations

import socket

__all__ = ["why_unreached"]

TIMEOUT = 5.0  # seconds


def why_unreached(address: str, timeout: float = TIMEOUT) -> str:
    """Why no connection to HOST:PORT opens, or "" where one does. A scheme before it (ray://) is passed over.

    Raises:
        ValueError: it is no address.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    number = int(port)
    if not 0 < number < 65536:
        raise ValueError(f"{number} is no port")
    try:
        socket.create_connection((host.strip("[]"), number), timeout).close()
    except OSError as error:
        return error.strerror or "no answer"
    return ""
