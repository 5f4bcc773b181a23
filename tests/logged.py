"""What a logger is given in a block, wherever its records go otherwise."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def messages_of(logger: logging.Logger) -> Iterator[list[str]]:
    """The messages of `logger` itself, as they come."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)  # whatever an earlier test's server has set for all of vLLM
    try:
        yield found
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
