"""How fast an answer comes: time to the first token, then tokens a second."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Meter"]

MEASURABLE = 0.05  # seconds; tokens that come within less were held up on the way and say nothing


class Meter:
    """Is told how many tokens there are whenever some have come.

    Attributes:
        wait: seconds until the first came; None before.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked = clock()
        self._first: tuple[float, int] | None = None
        self._last = (self._asked, 0)
        self.wait: float | None = None

    def note(self, tokens: int) -> None:
        """That many of the answer have come by now."""
        self._last = (self._clock(), tokens)
        if self._first is None:
            self._first = self._last
            self.wait = self._last[0] - self._asked

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first; None while there is nothing to measure."""
        if self._first is None or self._last[0] - self._first[0] < MEASURABLE:
            return None
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
