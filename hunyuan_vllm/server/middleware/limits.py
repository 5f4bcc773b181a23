"""The limits of one request and of all in flight: 413, 422 or 429 before the engine sees the request"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import wraps
from http import HTTPStatus
from typing import Any

from pydantic import TypeAdapter, ValidationError
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMUnprocessableEntityError

from hunyuan_vllm.server.middleware.asgi import BODY, NO_KEY, App, Message, Receive, Scope, Send, refuse, request_info
from hunyuan_vllm.server.middleware.bounds import check_bounds, read_json
from hunyuan_vllm.server.middleware.fields import Refused, read_fields
from hunyuan_vllm.server.middleware.metrics import count_refusal
from hunyuan_vllm.server.options import ApiPolicy


def limit_prompts(engine: EngineClient, most: int) -> None:
    """Make `engine.generate` refuse a prompt of more than `most` tokens.

    All handlers call it with the tokens of a whole prompt, so nothing is tokenised twice and every API is covered. It
    raises before it returns its generator, so no stream has begun. Beam search is excluded: it calls it with what has
    been generated so far.
    """
    upstream: Callable[..., Any] = engine.generate

    @wraps(upstream)
    def generate(prompt: Any, *args: Any, **keywords: Any) -> Any:
        tokens = len(prompt.get("prompt_token_ids") or ()) if isinstance(prompt, dict) else 0
        if tokens > most:
            count_refusal("prompt_tokens")
            raise VLLMUnprocessableEntityError(f"the prompt has {tokens} tokens, and this server takes at most {most}")
        return upstream(prompt, *args, **keywords)

    engine.generate = generate


GENERATING = {
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/cohere/v2/chat",
    "/generative_scoring",
    "/inference/v1/generate",
    "/invocations",
}
MAX_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
RETRY_AFTER = [(b"retry-after", b"1")]  # seconds; at any load, some request ends in that time
BODY_TIMEOUT = 120.0  # seconds
_integer = TypeAdapter(int)


class Limits:
    """Passes on a request within the limits, with its body in its info, and counts it until its answer has ended."""

    def __init__(self, app: App, policy: ApiPolicy) -> None:
        self._app = app
        self._policy = policy
        self._requests: Counter[str] = Counter()  # by key
        self._sequences = 0
        self._places = 0  # in the engine's batches; read when the server starts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._read_engine(scope["app"].state.engine_client)
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._body(scope, receive)
            if body is None:  # the client has gone
                return
            content = read_json(body)
            given = content if isinstance(content, dict) else {}  # vLLM reports what is not a JSON object
            request = read_fields(scope["path"], given, self._policy.ignore_unknown_fields)
            check_bounds(request)
            if request is not given:
                body = json.dumps(request).encode()
            request_info(scope)[BODY] = body
            if scope["path"] in GENERATING:
                await self._generate(scope, _replay(body, receive), send, request)
            else:
                await self._app(scope, _replay(body, receive), send)
        except Refused as refusal:
            count_refusal(refusal.reason)
            headers = RETRY_AFTER if refusal.status == HTTPStatus.TOO_MANY_REQUESTS else []
            await refuse(scope, send, refusal.status, refusal.message, refusal.field, headers)

    def _read_engine(self, engine: EngineClient) -> None:
        scheduler, parallel = engine.vllm_config.scheduler_config, engine.vllm_config.parallel_config
        self._places = scheduler.max_num_seqs * parallel.data_parallel_size
        if self._policy.max_prompt_tokens:
            limit_prompts(engine, self._policy.max_prompt_tokens)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        most = self._policy.max_body
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        too_large = Refused(None, f"the request is larger than {most} bytes", "body", status)
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if most and length.isdigit() and int(length) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if most and size > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            late = f"the request did not arrive within {BODY_TIMEOUT:g} s"
            raise Refused(None, late, "slow", HTTPStatus.REQUEST_TIMEOUT) from None

    async def _generate(self, scope: Scope, receive: Receive, send: Send, request: Mapping[str, Any]) -> None:
        sequences = self._check(request)
        key = request_info(scope).get("key", NO_KEY)
        self._check_load(key, sequences)
        self._requests[key] += 1
        self._sequences += sequences
        try:
            await self._app(scope, receive, send)
        finally:
            self._sequences -= sequences
            self._requests[key] -= 1

    def _check(self, request: Mapping[str, Any]) -> int:
        """Check one request, and return the sequences it asks for."""
        most = self._policy.max_output_tokens
        for field in MAX_TOKENS:
            wanted = _number(request.get(field))
            if most and wanted is not None and wanted > most:
                message = f"{field} is {wanted}, and this server generates at most {most} tokens"
                raise Refused(field, message, "max_tokens", HTTPStatus.UNPROCESSABLE_ENTITY)
        if self._policy.max_prompt_tokens and request.get("use_beam_search"):
            message = "use_beam_search is unavailable on this server, which limits prompts"
            raise Refused("use_beam_search", message, "prompt_tokens", HTTPStatus.UNPROCESSABLE_ENTITY)
        number, prompts = max(_number(request.get("n")) or 1, 1), _prompts(request)
        sequences, most = number * prompts, self._policy.max_sequences
        if most and sequences > most:
            what = f"n is {number}" + (f" for each of {prompts} prompts" if prompts > 1 else "")
            message = f"{what}, and this server generates at most {most} sequences per request"
            field = "n" if number > 1 else "prompt"
            raise Refused(field, message, "sequences", HTTPStatus.UNPROCESSABLE_ENTITY)
        return sequences

    def _check_load(self, key: str, sequences: int) -> None:
        most = self._policy.max_requests_per_key
        if most and self._requests[key] >= most:
            message = f"{most} requests with this key are in flight, which is its limit: try again later"
            raise Refused(None, message, "key_requests", HTTPStatus.TOO_MANY_REQUESTS)
        full = self._sequences + sequences > self._places + self._policy.max_queue
        if self._policy.max_queue and self._places and full and self._sequences:
            message = f"{self._policy.max_queue} sequences are waiting already: try again later"
            raise Refused(None, message, "queue", HTTPStatus.TOO_MANY_REQUESTS)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body again, and then the client's own messages."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _number(value: object) -> int | None:
    """A value as vLLM's request models read it, which accept "5" and 5.0 as 5; None if they would refuse it."""
    try:
        return _integer.validate_python(value)
    except ValidationError:
        return None


def _prompts(request: Mapping[str, Any]) -> int:
    for field in ("prompt", "messages"):
        value = request.get(field)
        if isinstance(value, list) and value and isinstance(value[0], str | list):
            return len(value)
    return 1
