"""The engine behind a batch run: vLLM's, with the request handlers of its server, without HTTP."""

import logging
from argparse import Namespace
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from hunyuan_vllm import envs
from hunyuan_vllm.batch.requests import BadLine, Request
from hunyuan_vllm.chat_template import known_faults, replacement, stored_template
from hunyuan_vllm.envs import Settings
from hunyuan_vllm.server.hardware import read_machine
from hunyuan_vllm.server.launch import decide
from hunyuan_vllm.server.middleware.errors import explain
from hunyuan_vllm.server.models import ModelSource
from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.server.vllm_serve import COMMAND
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.net import LOOPBACK

MIN_WINDOW = 1024


class EngineStopped(Exception):
    """The engine is dead; the lines in flight have no answer."""


@dataclass(frozen=True)
class EngineOptions:
    """How to start an engine.

    Attributes:
        argv: vLLM's options, model first.
        env: variables to set before vLLM is imported.
    """

    argv: list[str]
    env: dict[str, str]
    notes: list[str]


def engine_options(model: ModelSource, flags: Sequence[str], environ: Mapping[str, str]) -> EngineOptions:
    """Those that `hunyuan-vllm serve` would use, with the user's vLLM flags."""
    settings = replace(Settings.read(environ), host=LOOPBACK, api_key=False, api_key_file=None)
    machine = read_machine(environ)
    options = Flags(flags)
    if options.model:
        raise UserError(f"{options.model}: the model is named by --model or MODEL_PATH, before vLLM's flags")
    launch = decide(settings, options, machine, model, environ)
    notes = list(launch.notes)
    # The engine logs it too, and a batch run silences the log.
    if model.local and not ("chat-template" in options or envs.checkpoint_chat_template()):
        template, _ = stored_template(Path(model.name))
        if faults := known_faults(template or ""):
            notes.append(replacement(faults))
    return EngineOptions(launch.argv[len(COMMAND) :], launch.env, notes)


class Engine:
    """A running engine that answers requests."""

    def __init__(self, client: Any, state: Any) -> None:
        self._client = client
        self._chat, self._completions = state.openai_serving_chat, state.openai_serving_completion
        respond = self._completions.request_output_to_completion_response

        def respond_without_limit(outputs: Any, request: Any, *others: Any) -> Any:
            """vLLM asserts max_tokens, which it needs for `echo` alone and a prompt without a limit does not have."""
            if request.max_tokens is None:
                request = request.model_copy(update={"max_tokens": 0})
            return respond(outputs, request, *others)

        self._completions.request_output_to_completion_response = respond_without_limit

    @property
    def window(self) -> int:
        """How many requests keep the engine full while answered ones wait to be written."""
        config = self._client.vllm_config
        return max(MIN_WINDOW, 2 * config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size)

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
            # vLLM wraps what the engine's client raises in an exception without a message.
            response.error.message = response.error.message or repr(cause.__cause__ or cause)
        if not isinstance(response, ErrorResponse):
            return response
        error = response.error
        if self._client.errored:
            raise EngineStopped(error.message)
        problem = explain(error.message, error.param, request.body.model_dump(exclude_unset=True))
        raise BadLine(problem, error.type, error.code)


def parse_options(argv: Sequence[str]) -> Namespace:
    """Parse `EngineOptions.argv` with the parser of vLLM's server. Its environment variables must be set."""
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message} (vllm serve --help=all lists vLLM's flags)")

    args = make_arg_parser(Parser()).parse_args(argv)
    args.model = args.model_tag
    # A busy server refuses requests; here they wait.
    args.max_num_queued_reqs = args.max_num_queued_tokens = None
    return args


@asynccontextmanager
async def open_engine(args: Namespace) -> AsyncIterator[Engine]:
    """Start the engine, and stop it when the block ends."""
    from starlette.datastructures import State
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.usage.usage_lib import UsageContext

    # The record of a bad request holds what the handlers would log.
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
    """Why an engine did not start, in one line."""
    if isinstance(error, ValidationError):  # vLLM's configuration wraps what our checks raise
        first = error.errors()[0]
        if first["type"] == "value_error":
            return str(first["msg"]).removeprefix("Value error, ")
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return " ".join(str(error).split()) or type(error).__name__
