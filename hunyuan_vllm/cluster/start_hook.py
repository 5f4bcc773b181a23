"""Called by `ray start` before it starts anything (RAY_START_HOOK): disables the server for Ray's remote clients

`ray start` has no flag for that, and no program here connects that way: drivers run on the nodes.
"""

from typing import Any

HOOK = f"{__name__}.leave_client_server_out"


def leave_client_server_out(parameters: Any, head: bool) -> None:
    """`parameters` are Ray's RayParams, before they are used."""
    parameters.ray_client_server_port = None
