"""What must be in order beyond the server's own processes before it is started again: other nodes, where it has any."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Protocol

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.server.life import say
from hunyuan_vllm.server.ray_cluster import RayCluster, find_ray_cluster
from hunyuan_vllm.server.stop import Stop
from hunyuan_vllm.server.systemd import notify

__all__ = ["OneMachine", "RayNodes", "Surroundings"]

PERIOD = 2.0  # seconds
ORPHANS_TIMEOUT = 60.0
ORPHANS = "hunyuan_vllm.server.ray_orphans"


class Surroundings(Protocol):
    """The other nodes, as a supervisor needs them between two lives of its server."""

    def wait_until_whole(self, stop: Stop) -> None:
        """Until all is there that the server needs, or the operator wants no more."""

    def cleanup(self) -> None:
        """Then, end what the dead server left there. What cannot be reached is left; never raises."""


class OneMachine:
    """No other node: the server's own processes have been ended with it."""

    def wait_until_whole(self, stop: Stop) -> None:
        """It is."""

    def cleanup(self) -> None:
        """Nothing is left."""


class RayNodes:
    """The nodes of a Ray cluster. Ray itself ends the workers of a driver that died, where it lives; and it is Ray's
    own service (or `hunyuan-vllm cluster up`) that brings a node back. This waits for both, and ends what is left of
    workers whose Ray died.
    """

    def __init__(
        self,
        gpus: int,
        environ: Mapping[str, str],
        find: Callable[[Mapping[str, str]], RayCluster | None] = find_ray_cluster,
    ) -> None:
        """`gpus` is how many the server takes; `environ` says where the cluster is."""
        self._gpus, self._environ, self._find = gpus, environ, find

    def wait_until_whole(self, stop: Stop) -> None:
        """Until so many GPUs are free; says what is missing whenever that changes."""
        said = None
        while not stop.requested and (missing := self._missing()) is not None:
            if missing != said:
                say(f"waiting for the Ray cluster: {missing}")
            said = missing
            notify("WATCHDOG=1", f"STATUS=waiting for the Ray cluster: {missing}")
            stop.sleep(PERIOD)

    def cleanup(self) -> None:
        """End the workers that have outlived their Ray, on every node that is in the cluster."""
        try:
            done = subprocess.run(
                [sys.executable, "-m", ORPHANS],
                env=dict(self._environ),
                capture_output=True,
                text=True,
                timeout=ORPHANS_TIMEOUT,
            )
        except (OSError, subprocess.TimeoutExpired):
            return
        for line in done.stdout.splitlines():
            if line.startswith("ENDED "):
                say(f"ended a worker that had outlived its Ray: {line.removeprefix('ENDED ')}")

    def _missing(self) -> str | None:
        try:
            cluster = self._find(self._environ)
        except UserError as error:
            return str(error)
        if cluster is None:
            return "it is not running"
        if cluster.free_gpus >= self._gpus:
            return None
        nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''}"
        return f"{cluster.free_gpus} of {self._gpus} GPUs are free ({cluster.gpus} on {nodes})"
