"""A limit on the tokens of a prompt below the model's context length, which vLLM's server does not have."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMUnprocessableEntityError

from hunyuan_vllm.server.refusals import count_refusal

__all__ = ["limit_prompts"]


def limit_prompts(engine: EngineClient, most: int) -> None:
    """Have `engine.generate` refuse a prompt of more than `most` tokens.

    All handlers call it with the tokens of a whole prompt, so nothing is tokenised twice and no API is forgotten. It
    raises before it returns its generator: a stream has not begun then. Not for beam search, which calls it with what
    has been generated so far.
    """
    stock: Callable[..., Any] = engine.generate

    @wraps(stock)
    def generate(prompt: Any, *args: Any, **keywords: Any) -> Any:
        tokens = len(prompt.get("prompt_token_ids") or ()) if isinstance(prompt, dict) else 0
        if tokens > most:
            count_refusal("prompt_tokens")
            raise VLLMUnprocessableEntityError(f"the prompt has {tokens} tokens, and this server takes at most {most}")
        return stock(prompt, *args, **keywords)

    engine.generate = generate
