"""The part of a run that needs an engine, and how it is stopped: by Ctrl-C, by a signal, by the engine's end."""

from __future__ import annotations

import asyncio
import signal
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from types import FrameType

from hunyuan_vllm.batch.engine import EngineStopped, open_engine
from hunyuan_vllm.batch.lines import Line
from hunyuan_vllm.batch.progress import Reporter
from hunyuan_vllm.batch.records import Record, Settings
from hunyuan_vllm.batch.requests import BadLine, Request
from hunyuan_vllm.batch.runner import Runner

__all__ = ["generate"]


def generate(
    args: Namespace,
    requests: Iterable[tuple[Line, Request | BadLine]],
    settings: Settings,
    append: Callable[[Sequence[Record]], None],
    reporter: Reporter,
) -> str | None:
    """Start the engine and run the requests, until all are written or the user stops it.

    Args:
        args: vLLM's options.
        append: puts records into the output.

    Returns why it stopped of itself, or None.

    Raises:
        UserError: the engine does not start.
    """
    signal.signal(signal.SIGINT, _interrupt)  # at once: asyncio's own would wait until the engine is there
    try:
        asyncio.run(_generate(args, requests, settings, append, reporter))
    except KeyboardInterrupt:  # while the engine was being started
        return None
    except EngineStopped as error:
        return str(error)
    except OSError as error:
        return f"the output cannot be written: {error.strerror}"
    return None


async def _generate(
    args: Namespace,
    requests: Iterable[tuple[Line, Request | BadLine]],
    settings: Settings,
    append: Callable[[Sequence[Record]], None],
    reporter: Reporter,
) -> None:
    def write(records: Sequence[Record]) -> None:
        append(records)
        reporter.advance(records)

    async with AsyncExitStack() as stack:
        with reporter.loading():
            engine = await stack.enter_async_context(open_engine(args))
        runner = Runner(engine.answer, settings, write, engine.window)
        _obey_signals(runner, reporter)
        with reporter:
            await runner.run(requests)


def _obey_signals(runner: Runner, reporter: Reporter) -> None:
    def interrupt() -> None:
        if runner.draining:
            runner.drop()
        else:
            runner.drain()
            reporter.say(f"finishing the {runner.in_flight} lines in flight; Ctrl-C again gives them up")

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, interrupt)
    loop.add_signal_handler(signal.SIGTERM, runner.drop)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
