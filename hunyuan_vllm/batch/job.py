"""A batch from its input file to its output file"""

import asyncio
import os
import signal
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

from rich.console import Console

from hunyuan_vllm.batch.engine import EngineStopped, engine_options, open_engine, parse_options
from hunyuan_vllm.batch.output import Output, Record, Settings
from hunyuan_vllm.batch.requests import BadLine, Request, build, index_file, read_requests
from hunyuan_vllm.batch.runner import Reporter, Runner
from hunyuan_vllm.server.models import ModelSource
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.jsonl import Line
from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import plural


def generate(
    args: Namespace,
    requests: Iterable[tuple[Line, Request | BadLine]],
    settings: Settings,
    append: Callable[[Sequence[Record]], None],
    reporter: Reporter,
) -> str | None:
    """Start the engine and run the requests until all are written or the user stops it.

    Returns what made it stop early, or None.
    """

    def write(records: Sequence[Record]) -> None:
        append(records)
        reporter.advance(records)

    async def run() -> None:
        async with AsyncExitStack() as stack:
            with reporter.progress.console.status("loading the model"):
                engine = await stack.enter_async_context(open_engine(args))
            runner = Runner(engine.answer, settings, write, engine.window)
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGINT, finish, runner)
            loop.add_signal_handler(signal.SIGTERM, runner.drop)
            with reporter.writing():
                await runner.run(requests)

    def finish(runner: Runner) -> None:
        if runner.draining:
            runner.drop()
        else:
            runner.drain()
            text = f"finishing {plural(runner.in_flight, 'line')} in flight; press Ctrl-C again to drop them"
            reporter.progress.say(text)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # In place of Python's own handler, which asyncio replaces by one that acts only once the engine is there.
    signal.signal(signal.SIGINT, interrupt)
    try:
        asyncio.run(run())
    except KeyboardInterrupt:  # while the engine was being started
        return None
    except EngineStopped as error:
        return str(error)
    except OSError as error:
        return f"the output cannot be written: {error.strerror}"
    return None


FAILED_LINES, STOPPED, INTERRUPTED = 1, 3, 130  # exit statuses


def run_batch(
    source: Path,
    target: Path,
    model: ModelSource,
    console: Console,
    *,
    defaults: Mapping[str, Any] = {},
    flags: Sequence[str] = (),
    retry_failed: bool = False,
) -> int:
    """Answer the lines of `source` that `target` has no record of, and return the exit status."""
    _check_files(source, target)
    with console.status(f"reading {source}"):
        index = index_file(source)
    settings = Settings(model.given, defaults)
    with closing(Output(target)) as output:
        state = output.resume(index, settings, retry_failed)
        reporter = Reporter(index.requests, state.pending.count(1), state.failed, Progress(console))
        cause = None
        if reporter.left:
            options = engine_options(model, flags, os.environ)
            os.environ.update(options.env)  # before vLLM is imported, which reads them
            args = parse_options(options.argv)
            _check_defaults(defaults)
            for note in options.notes:
                reporter.progress.say(note)
            part = f"{reporter.left:,} of " if reporter.left < reporter.total else ""
            reporter.progress.say(f"starting {model.given} for {part}{plural(reporter.total, 'line')}")
            requests = read_requests(source, index, defaults, state.pending)
            cause = generate(args, requests, settings, output.append, reporter)
    if cause:
        reporter.progress.say(cause)
    reporter.progress.say(reporter.summary())
    if reporter.left:
        reporter.progress.say(f"{plural(reporter.left, 'line')} left: run the same command again to continue")
        return STOPPED if cause else INTERRUPTED
    if reporter.failed:
        reporter.progress.say(f"each failed line is in {target} with its error; --retry-failed runs them again")
        return FAILED_LINES
    return 0


def _check_files(source: Path, target: Path) -> None:
    if not source.exists():
        raise UserError(f"{source} does not exist")
    if not source.is_file():
        raise UserError(f"{source} is not a regular file, and it is read twice: save its content to a file")
    if target.exists() and not target.is_file():
        raise UserError(f"{target} is not a regular file: name another output file")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} does not exist: create it, or name another output file")
    if target.exists() and source.samefile(target):
        raise UserError(f"{source} is both input and output: name another output file")


def _check_defaults(defaults: Mapping[str, Any]) -> None:
    """Raise UserError if neither a chat nor a completion can have them."""
    problems = []
    for form in ({"messages": [{"role": "user", "content": "?"}]}, {"prompt": "?"}):
        try:
            build(Line(0, form), defaults)
        except BadLine as bad:
            problems.append(str(bad))
    if len(problems) == 2:
        raise UserError(f"as a default for all lines, {problems[0]}")
