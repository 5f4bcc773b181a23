"""Tells systemd how the service is (sd_notify), where systemd wants to know: units of Type=notify."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress

__all__ = ["SOCKET_VARIABLE", "notify"]

SOCKET_VARIABLE = "NOTIFY_SOCKET"


def notify(*states: str, environ: Mapping[str, str] = os.environ) -> None:
    """Send lines such as READY=1, STATUS=…, STOPPING=1 or WATCHDOG=1; without such a systemd, do nothing."""
    address = environ.get(SOCKET_VARIABLE, "")
    if not address.startswith(("/", "@")):
        return
    if address[0] == "@":  # an abstract socket
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.sendto("\n".join(states).encode(), address)
