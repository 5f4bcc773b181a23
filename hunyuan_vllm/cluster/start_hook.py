"""What Ray calls before `ray start` starts anything (RAY_START_HOOK): the server for Ray's remote clients is left out.

`ray start` has no flag for that, and nothing here connects in that way: drivers run on the nodes.
"""

from __future__ import annotations

from typing import Any

__all__ = ["HOOK", "leave_client_server_out"]

HOOK = f"{__name__}.leave_client_server_out"


def leave_client_server_out(parameters: Any, head: bool) -> None:
    """`parameters` are Ray's RayParams, before they are used."""
    parameters.ray_client_server_port = None
