"""Counters of requests, refusals and tokens, over all API servers"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from vllm.engine.protocol import EngineClient

from hunyuan_vllm.server.middleware.asgi import Message, Scope, Send

_answered = Counter("hunyuan_requests_answered", "Requests, probes apart, by the status clients saw", ["status"])
for _status in ("2xx", "3xx", "4xx", "5xx"):
    _answered.labels(_status)  # a rate wants the zero before the first


def count_answer(status: int) -> None:
    """Count one; `status` is that of HTTP."""
    _answered.labels(f"{status // 100}xx").inc()


REASONS = (
    "key",
    "route",
    "body",
    "slow",
    "json",
    "max_tokens",
    "sequences",
    "prompt_tokens",
    "key_requests",
    "queue",
)
_refused = Counter("hunyuan_requests_refused", "Requests refused before the engine heard of them", ["reason"])
for _reason in REASONS:
    _refused.labels(_reason)  # a rate wants the zero before the first


def count_refusal(reason: str) -> None:
    """Count one; `reason` is one of REASONS."""
    _refused.labels(reason).inc()


DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # vLLM sets it
NEGOTIATED = (b"accept", b"accept-encoding")


def are_shared() -> bool:
    """Whether there are several API servers."""
    return DIRECTORY in os.environ


def plainly(scope: Scope) -> Scope:
    """The request without a wish for OpenMetrics, which has an end that nothing may follow, or for compression."""
    return {**scope, "headers": [pair for pair in scope["headers"] if pair[0].lower() not in NEGOTIATED]}


def adding(send: Send, registry: CollectorRegistry) -> Send:
    """`send` for an answer in Prometheus's text format, in one piece, to which the figures of `registry` are added."""
    start: Message = {}

    async def add(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            start = message
            return
        body = message.get("body", b"") + generate_latest(registry)
        headers = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
        await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await send({**message, "body": body})

    return add


NOBODY = "-"  # whose tokens they are on a server without keys
PROMPT, GENERATED = "prompt_tokens", "generated_tokens"
# The notes (asgi.py) of the request that is being answered.
REQUEST: ContextVar[dict[str, Any] | None] = ContextVar("hunyuan_vllm_request", default=None)

_prompt = Counter("hunyuan_prompt_tokens", "Tokens of prompts, by the name of the key", ["key"])
_generated = Counter("hunyuan_generated_tokens", "Tokens generated, by the name of the key", ["key"])


def count_tokens(engine: EngineClient) -> None:
    """Have `engine.generate` count, for /metrics and in the request's notes, what it takes and gives.

    What a client that goes away has had until then is counted, too.
    """
    stock: Callable[..., AsyncGenerator[Any, None]] = engine.generate

    @wraps(stock)
    def generate(*args: Any, **keywords: Any) -> AsyncGenerator[Any, None]:
        outputs = stock(*args, **keywords)
        notes = REQUEST.get()
        return outputs if notes is None else _counted(outputs, notes)

    engine.generate = generate


async def _counted(outputs: AsyncGenerator[Any, None], notes: dict[str, Any]) -> AsyncGenerator[Any, None]:
    prompt = generated = 0
    try:
        async for output in outputs:
            if not prompt:
                prompt = len(output.prompt_token_ids or ())
                notes[PROMPT] = notes.get(PROMPT, 0) + prompt
            new = sum(len(sequence.token_ids) for sequence in output.outputs)
            generated += new
            # At once: of several prompts, vLLM closes the generators when it has answered.
            notes[GENERATED] = notes.get(GENERATED, 0) + new
            yield output
    finally:
        await outputs.aclose()
        key = notes.get("key", NOBODY)
        _prompt.labels(key).inc(prompt)
        _generated.labels(key).inc(generated)
