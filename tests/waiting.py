"""Waiting for what happens in its own time, instead of for a time in which it should have happened."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(ask: Callable[[], T], seconds: float = 60) -> T:
    """The first answer that is true.

    Raises:
        AssertionError: there was none in `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"{answer!r} after {seconds:g} s"
        time.sleep(0.05)
    return answer
