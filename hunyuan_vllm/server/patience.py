"""How long a running server may fail to answer before it counts as dead, by what it says of itself."""

from __future__ import annotations

from hunyuan_vllm.server.verdict import Verdict

__all__ = ["Patience"]

LAST_WORDS = 5.0  # seconds in which a server whose engine has died tells its clients, and ends by itself
PERIOD = 5.0  # seconds between two questions, at most
SLOW = 10  # times the limit for one that still works, but gives nobody a token: long prompts are being read


class Patience:
    """Follows the answers to /readyz, one server's life long.

    Attributes:
        period: seconds between two questions to a server that has been ready.
    """

    def __init__(self, start_timeout: float, hang_timeout: float, now: float) -> None:
        """Args:
        start_timeout: seconds until it must be ready for the first time.
        hang_timeout: seconds that it may stand still after that.
        now: when it was started; times are time.monotonic().
        """
        self.period = min(PERIOD, hang_timeout / 4)
        self._start_timeout, self._hang_timeout = start_timeout, hang_timeout
        self._started = now
        self._was_ready = False
        self._silent_since = self._moved = now
        self._died: float | None = None

    def worn_out(self, verdict: Verdict, now: float) -> str | None:
        """Why the server is to be killed after this answer; None to let it live."""
        if verdict.ready or verdict.status == "draining":
            self._was_ready = True
            self._silent_since = self._moved = now
            return None
        if not self._was_ready:
            if now - self._started >= self._start_timeout:
                return f"it was not ready after {now - self._started:.0f} s"
            return None
        if verdict.status == "dead":
            self._died = now if self._died is None else self._died
            return f"{verdict.reason}, but it goes on" if now - self._died >= LAST_WORDS else None
        if verdict.status == "slow":
            self._moved = now
        for since, limit in ((self._moved, self._hang_timeout), (self._silent_since, SLOW * self._hang_timeout)):
            if now - since >= limit:
                return f"it hangs: {verdict.reason}, for {now - since:.0f} s by now"
        return None
