"""`serve --supervise`: restarts with back-off, on nodes that are clean and complete"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from hunyuan_vllm import envs
from hunyuan_vllm.server.health_status import Verdict
from hunyuan_vllm.server.launch import Launch
from hunyuan_vllm.server.process import Stop, notify
from hunyuan_vllm.server.ray_cluster import RayCluster, find_ray_cluster
from hunyuan_vllm.server.run import Life, Patience, live, say
from hunyuan_vllm.server.run import ask as ask_server
from hunyuan_vllm.util.errors import UserError


class Backoff:
    """Counts deaths in a row.

    Attributes:
        failures: deaths since the server last was ready for long.
    """

    def __init__(self, first: float = 1.0, most: float = 60.0, forgiven_after: float = 60.0) -> None:
        """Args:
        first: seconds of the first wait.
        most: seconds that no wait exceeds.
        forgiven_after: seconds of readiness after which a death counts as the first again.
        """
        self.failures = 0
        self._first, self._most, self._forgiven_after = first, most, forgiven_after

    def after(self, ready_for: float | None) -> float:
        """Note a death after so many seconds of readiness (None: it never was ready); the seconds to wait now."""
        if ready_for is not None and ready_for >= self._forgiven_after:
            self.failures = 0
        self.failures += 1
        return min(self._most, self._first * 2 ** min(self.failures - 1, 30))


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


GAVE_UP = os.EX_UNAVAILABLE
REFUSED = 2  # vLLM's status where its options are wrong: they will be wrong the next time, too


@dataclass(frozen=True)
class Tolerance:
    """What the supervisor puts up with.

    Attributes:
        start_timeout: seconds until a server must be ready.
        hang_timeout: seconds a ready server may stand still.
        max_restarts: restarts in a row, without a minute of readiness between, after which it gives up; None: never.
        max_wait: seconds that no wait before a restart exceeds.
    """

    start_timeout: float = 3600.0
    hang_timeout: float = 60.0
    max_restarts: int | None = None
    max_wait: float = 60.0


Ask = Callable[[Launch], Verdict]


def run_once(launch: Launch, environ: Mapping[str, str], stop: Stop, ask: Ask = ask_server) -> int:
    """A server's one life, unsupervised.

    Returns:
        Its exit status (128 + n if signal n ended it); 0 where it was told to end before it was ready.
    """
    life = live(launch, environ, stop, ask=ask)
    if stop.requested:
        return _status_when_stopped(life)
    if life.ready_for is None:
        say(f"the server stopped before it was ready: {life.cause}")
        return life.status or 1
    say(f"the server died: {life.cause}")
    return life.status or 1


def supervise(
    launch: Launch,
    environ: Mapping[str, str],
    stop: Stop,
    surroundings: Surroundings,
    tolerance: Tolerance,
    backoff: Backoff | None = None,
    ask: Ask = ask_server,
) -> int:
    """Keep a server running until the operator ends it.

    Returns:
        The exit status of a server that was told to end; REFUSED if vLLM does not take its options; GAVE_UP.
    """
    backoff = backoff or Backoff(most=tolerance.max_wait)
    restarts = 0
    while True:
        patience = Patience(tolerance.start_timeout, tolerance.hang_timeout, monotonic())
        life = live(launch, {**environ, envs.SUPERVISOR_RESTARTS: str(restarts)}, stop, patience, ask)
        if stop.requested:
            return _status_when_stopped(life)
        if life.ready_for is None and life.status == REFUSED:
            say(f"vLLM does not take these options: {life.cause}")
            return REFUSED
        wait = backoff.after(life.ready_for)
        lived = "before it was ready" if life.ready_for is None else f"after {life.ready_for:.0f} s of service"
        if tolerance.max_restarts is not None and backoff.failures > tolerance.max_restarts:
            say(f"the server died {lived}: {life.cause}; giving up after {backoff.failures} such deaths in a row")
            return GAVE_UP
        restarts += 1
        what_next = f"the server died {lived}: {life.cause}; restart {restarts} in {wait:.0f} s"
        say(what_next)
        notify(f"STATUS={what_next}")
        stop.sleep(wait)
        surroundings.wait_until_whole(stop)
        if stop.requested:
            return 0
        surroundings.cleanup()
        notify(f"STATUS=starting (restart {restarts})")


def _status_when_stopped(life: Life) -> int:
    """A start that was broken off has not failed, whatever status that gives; one that was killed shows it."""
    interrupted = life.ready_for is None and life.status != 128 + 9
    return 0 if interrupted else life.status
