"""Tokens that pass through `engine.generate`, counted by key"""

from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

from prometheus_client import Counter
from vllm.engine.protocol import EngineClient

from hunyuan_vllm.server.middleware.asgi import NO_KEY

PROMPT, GENERATED = "prompt_tokens", "generated_tokens"
# The request_info of the request that is being answered.
REQUEST: ContextVar[dict[str, Any] | None] = ContextVar("hunyuan_vllm_request", default=None)

_prompt = Counter("hunyuan_prompt_tokens", "Tokens of prompts, by the name of the key", ["key"])
_generated = Counter("hunyuan_generated_tokens", "Tokens generated, by the name of the key", ["key"])


def count_tokens(engine: EngineClient) -> None:
    """Make `engine.generate` count tokens, for /metrics and in the request's info.

    For a client that goes away, tokens generated until then are counted.
    """
    upstream: Callable[..., AsyncGenerator[Any, None]] = engine.generate

    @wraps(upstream)
    def generate(*args: Any, **keywords: Any) -> AsyncGenerator[Any, None]:
        outputs = upstream(*args, **keywords)
        info = REQUEST.get()
        return outputs if info is None else _counted(outputs, info)

    engine.generate = generate


async def _counted(outputs: AsyncGenerator[Any, None], info: dict[str, Any]) -> AsyncGenerator[Any, None]:
    prompt = generated = 0
    try:
        async for output in outputs:
            if not prompt:
                prompt = len(output.prompt_token_ids or ())
                info[PROMPT] = info.get(PROMPT, 0) + prompt
            new = sum(len(sequence.token_ids) for sequence in output.outputs)
            generated += new
            # Not at the end: with several prompts, vLLM closes the generators only after it has answered.
            info[GENERATED] = info.get(GENERATED, 0) + new
            yield output
    finally:
        await outputs.aclose()
        key = info.get("key", NO_KEY)
        _prompt.labels(key).inc(prompt)
        _generated.labels(key).inc(generated)
