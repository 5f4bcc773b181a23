"""How long to wait before a server that died is started again: doubled with each death, unless it had lived well."""

from __future__ import annotations

__all__ = ["Backoff"]


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
