"""The engine behind a batch run: vLLM's, with the request handlers of its server, without HTTP."""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import BaseModel, ValidationError

from hunyuan_vllm import envs
from hunyuan_vllm.batch.requests import BadLine, Request
from hunyuan_vllm.chat_template import known_faults, replacement, stored_template
from hunyuan_vllm.cluster.joined import cluster_variables
from hunyuan_vllm.server.hardware import probe
from hunyuan_vllm.server.launch import decide
from hunyuan_vllm.server.middleware.errors import explain
from hunyuan_vllm.server.models import ModelSource
from hunyuan_vllm.server.options import LOOPBACK, Flags, Settings
from hunyuan_vllm.util.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace

    from vllm.engine.protocol import EngineClient

__all__ = ["Engine", "EngineStopped", "Plan", "one_line", "open_engine", "parse_options", "plan"]

LEAST_WINDOW = 1024


class EngineStopped(Exception):
    """The engine is dead; the lines in flight have no answer."""


@dataclass(frozen=True)
class Plan:
    """An engine to start.

    Attributes:
        argv: vLLM's options, model first.
        env: variables to set before vLLM is imported.
        notes: what the user should know about the choices made.
    """

    argv: list[str]
    env: dict[str, str]
    notes: list[str]


def plan(model: ModelSource, flags: Sequence[str], environ: Mapping[str, str]) -> Plan:
    """The engine that `hunyuan-vllm serve` would start, with the user's vLLM flags.

    Raises:
        UserError: it cannot work.
    """
    joined = cluster_variables(environ)
    environ = {**environ, **{name: value for name, value in joined.items() if name.startswith("RAY_")}}
    settings = replace(Settings.read(environ), host=LOOPBACK, api_key=False, api_key_file=None)
    machine = probe(environ, sys.executable)
    options = Flags(flags)
    if options.model:
        raise UserError(f"{options.model}: the model is named by --model or MODEL_PATH, before vLLM's flags")
    launch = decide(settings, options, machine, model, environ)
    notes = list(launch.notes)
    # A server's log says it, and here the log is quiet.
    if model.local and not ("chat-template" in options or envs.checkpoint_chat_template()):
        template, _ = stored_template(Path(model.name))
        if faults := known_faults(template or ""):
            notes.append(replacement(faults))
    env = joined | launch.env if launch.ray_gpus else launch.env
    return Plan(launch.argv[len(machine.vllm_command) :], env, notes)


class Engine:
    """A running engine that answers requests."""

    def __init__(self, client: EngineClient, state: Any) -> None:
        self._client = client
        self._chat, self._completions = state.openai_serving_chat, state.openai_serving_completion

    @property
    def window(self) -> int:
        """Requests that keep it full while answered ones wait to be written."""
        config = self._client.vllm_config
        return max(LEAST_WINDOW, 2 * config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size)

    async def answer(self, request: Request) -> BaseModel:
        """The response of vLLM's server.

        Raises:
            BadLine: the request cannot be answered; names the field.
            EngineStopped: the engine is dead.
        """
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

        try:
            if isinstance(request.body, CompletionRequest):
                response = await self._completions.create_completion(request.body)
            else:
                response = await self._chat.create_chat_completion(request.body)
        except Exception as cause:
            response = create_error_response(cause)
        if not isinstance(response, ErrorResponse):
            return response
        error = response.error
        if self._client.errored:
            raise EngineStopped(error.message)
        problem = explain(error.message, error.param, request.body.model_dump(exclude_unset=True))
        raise BadLine(problem, error.type, error.code)


def parse_options(argv: Sequence[str]) -> Namespace:
    """Read a plan's `argv` with the parser of vLLM's server. Its environment variables must be set.

    Raises:
        UserError: an option is none of vLLM's, or has no such value.
    """
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message} (vllm serve --help=all lists vLLM's flags)")

    args = make_arg_parser(Parser()).parse_args(argv)
    args.model = args.model_tag
    # A server turns requests away when it is too busy. Here they wait.
    args.max_num_queued_reqs = args.max_num_queued_tokens = None
    return args


@asynccontextmanager
async def open_engine(args: Namespace) -> AsyncIterator[Engine]:
    """Start the engine; it ends with the block.

    Raises:
        UserError: it does not start; says why.
    """
    from starlette.datastructures import State
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.usage.usage_lib import UsageContext

    # What the handlers log of a bad request is in its record.
    logging.getLogger("vllm.entrypoints").setLevel(logging.CRITICAL)
    async with AsyncExitStack() as stack:
        try:
            starting = build_async_engine_client(args, usage_context=UsageContext.OPENAI_BATCH_RUNNER)
            client = await stack.enter_async_context(starting)
            state = State()
            await init_app_state(client, state, args, await client.get_supported_tasks())
        except Exception as error:
            raise UserError(f"the engine did not start: {one_line(error)}") from error
        yield Engine(client, state)


def one_line(error: Exception) -> str:
    """What an engine that did not start says of it, as one line."""
    if isinstance(error, ValidationError):  # vLLM's configuration, which wraps what our checks raise
        first = error.errors()[0]
        if first["type"] == "value_error":
            return str(first["msg"]).removeprefix("Value error, ")
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return " ".join(str(error).split()) or type(error).__name__
