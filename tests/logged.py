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
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
