"""Whether a running server can generate, and when one that cannot is given up"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

from hunyuan_vllm import envs

if TYPE_CHECKING:
    from hunyuan_vllm.server.launch import Launch

READY = ("ready", "busy")
ANSWER_MARGIN = 5.0  # seconds an answer may take beyond what the server itself waits for a token
CHECK_PERIOD = 5.0  # seconds between two checks, at most
EXIT_TIME = 5.0  # seconds in which a server whose engine has died answers its clients and exits by itself
SLOW_FACTOR = 10  # times the hang timeout for a server that computes but returns no token: it reads long prompts


@dataclass(frozen=True)
class HealthStatus:
    """Whether a server can generate.

    Attributes:
        status: "warming", before the first token; "ready"; "busy", no token in time but others got theirs; "slow",
            nobody got a token but the engine goes on stepping (long prompts); "stalled", it does not even step;
            "failed", the completion was refused; "dead", the engine has ended; "draining", it is about to stop;
            "silent", the server does not answer.
        reason: why not, for people. Says nothing of the model, its users or the machine.
    """

    status: str
    reason: str = ""

    @property
    def ready(self) -> bool:
        return self.status in READY


def read_health(launch: Launch) -> HealthStatus:
    """The server's answer to /readyz, for which it generates a token."""
    # The certificate names the host that clients use; this connects to an address, and sends no key.
    transport = httpx.HTTPTransport(uds=launch.uds, verify=False)
    timeout = envs.ready_timeout() + ANSWER_MARGIN
    try:
        with httpx.Client(base_url=launch.local_url, transport=transport, timeout=timeout) as client:
            content = client.get("/readyz").json()
        return HealthStatus(str(content["status"]), str(content["reason"]))
    except httpx.TransportError as error:
        return HealthStatus("silent", f"it does not answer ({type(error).__name__})")
    except (ValueError, KeyError, TypeError):
        return HealthStatus("silent", "another program answers on its port")


class HealthMonitor:
    """Detects from one server's health, checked again and again, that it hangs.

    Attributes:
        period: seconds between two checks of a server that has been ready.
    """

    def __init__(self, start_timeout: float, hang_timeout: float, now: float) -> None:
        """Args:
        start_timeout: seconds until it must be ready for the first time.
        hang_timeout: seconds without progress after that.
        now: when it was started; times are time.monotonic().
        """
        self.period = min(CHECK_PERIOD, hang_timeout / 4)
        self._start_timeout, self._hang_timeout = start_timeout, hang_timeout
        self._started = now
        self._was_ready = False
        self._last_ready = self._last_progress = now
        self._dead_since: float | None = None

    def reason_to_kill(self, health: HealthStatus, now: float) -> str | None:
        """Why the server should be killed, given its health now; None if it should not."""
        if health.ready or health.status == "draining":
            self._was_ready = True
            self._last_ready = self._last_progress = now
            return None
        if not self._was_ready:
            waited = now - self._started
            return f"it was not ready after {waited:.0f} s" if waited >= self._start_timeout else None
        if health.status == "dead":
            self._dead_since = now if self._dead_since is None else self._dead_since
            return f"{health.reason}, but it does not exit" if now - self._dead_since >= EXIT_TIME else None
        if health.status == "slow":
            self._last_progress = now
        limits = ((self._last_progress, self._hang_timeout), (self._last_ready, SLOW_FACTOR * self._hang_timeout))
        for since, limit in limits:
            if now - since >= limit:
                return f"it hangs: {health.reason}, for {now - since:.0f} s"
        return None
