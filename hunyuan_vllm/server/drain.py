"""Draining: on SIGTERM, requests that are under way finish, within a grace time, before vLLM is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

__all__ = ["Drain"]

REPORTS_DEATHS = "vllm.v1.engine.async_llm"  # a logger
logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name


class Drain:
    """Counts the requests under way, and takes SIGTERM from vLLM, which would end them.

    Attributes:
        draining: no new request is to be taken.
    """

    def __init__(self, grace: float) -> None:
        """`grace` is how long, in seconds, requests may go on after SIGTERM."""
        self.draining = False
        self._grace = grace
        self._under_way = 0
        self._ending: asyncio.Task[None] | None = None

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a request, from its first byte to the last byte of its answer."""
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    def take_sigterm(self) -> None:
        """Drain on SIGTERM. Call it in the event loop, after vLLM has set its own handlers for SIGTERM and SIGINT."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._begin)

    def _begin(self) -> None:
        if not self.draining:
            self.draining = True
            self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        logger.info("Draining: %d requests under way have %g s to finish", self._under_way, self._grace)
        deadline = time.monotonic() + self._grace
        while self._under_way and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if self._under_way:
            logger.warning("Draining: %d requests took too long and are cut off", self._under_way)
        else:
            logger.info("Draining: all requests have finished")
        logging.getLogger(REPORTS_DEATHS).addFilter(_is_no_death)
        os.kill(os.getpid(), signal.SIGINT)  # for which vLLM's own handler, the same as for SIGTERM, is still there


def _is_no_death(record: logging.LogRecord) -> bool:
    """vLLM kills its engine as it stops, and then reports, with a traceback, that it is dead."""
    return not (record.exc_info and isinstance(record.exc_info[1], EngineDeadError))
