"""`serve --supervise`: a server that died or hangs is started again, on nodes that are clean and all there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic

from hunyuan_vllm import envs
from hunyuan_vllm.server import ready
from hunyuan_vllm.server.backoff import Backoff
from hunyuan_vllm.server.launch import Launch
from hunyuan_vllm.server.life import Life, live, say
from hunyuan_vllm.server.patience import Patience
from hunyuan_vllm.server.stop import Stop
from hunyuan_vllm.server.surroundings import Surroundings
from hunyuan_vllm.server.systemd import notify
from hunyuan_vllm.server.verdict import Verdict

__all__ = ["GAVE_UP", "REFUSED", "Tolerance", "run", "supervise"]

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


def run(launch: Launch, environ: Mapping[str, str], stop: Stop, ask: Ask = ready.ask) -> int:
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
    ask: Ask = ready.ask,
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
