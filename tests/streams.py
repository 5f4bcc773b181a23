"""Answers that come in parts, counted on machines that may be busy."""

from collections.abc import Callable, Sized
from typing import TypeVar

Parts = TypeVar("Parts", bound=Sized)
TRIES = 5


def in_parts(ask: Callable[[], Parts], more_than: int) -> Parts:
    """What `ask` returns, if it has more parts than that in one of a few tries.

    Servers send together what an engine made while they, or their client, did not get to run.
    """
    for _ in range(TRIES):
        parts = ask()
        if len(parts) > more_than:
            return parts
    raise AssertionError(f"{len(parts)} parts at most, not more than {more_than}: it was not streamed")
