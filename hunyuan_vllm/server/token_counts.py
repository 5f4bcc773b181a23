"""Tokens of prompts and answers, by key: counted where the engine hands them out, so that no API is forgotten."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

from prometheus_client import Counter
from vllm.engine.protocol import EngineClient

__all__ = ["GENERATED", "PROMPT", "REQUEST", "count_tokens"]

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
