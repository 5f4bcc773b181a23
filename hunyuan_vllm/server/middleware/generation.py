"""What passes through `engine.generate`: tokens are counted by key, and fast streams are sent in longer chunks"""

import time
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

from prometheus_client import Counter
from vllm.engine.protocol import EngineClient
from vllm.sampling_params import RequestOutputKind, SamplingParams

from hunyuan_vllm.server.middleware.asgi import NO_KEY

PROMPT, GENERATED = "prompt_tokens", "generated_tokens"
# The request_info of the request that is being answered.
REQUEST: ContextVar[dict[str, Any] | None] = ContextVar("hunyuan_vllm_request", default=None)

_prompt = Counter("hunyuan_prompt_tokens", "Tokens of prompts, by the name of the key", ["key"])
_generated = Counter("hunyuan_generated_tokens", "Tokens generated, by the name of the key", ["key"])


def follow_generation(engine: EngineClient) -> None:
    """Make `engine.generate` count tokens, for /metrics and in the request's info, and choose the stream interval.

    For a client that goes away, tokens generated until then are counted.
    """
    upstream: Callable[..., AsyncGenerator[Any, None]] = engine.generate
    intervals = StreamIntervals()

    @wraps(upstream)
    def generate(prompt: Any, sampling_params: Any, *args: Any, **keywords: Any) -> AsyncGenerator[Any, None]:
        streams = isinstance(sampling_params, SamplingParams) and (
            sampling_params.output_kind is not RequestOutputKind.FINAL_ONLY
        )
        if streams and sampling_params.stream_interval is None:
            sampling_params.stream_interval = intervals.choose()
        outputs = upstream(prompt, sampling_params, *args, **keywords)
        if streams:
            outputs = intervals.measure(outputs)
        info = REQUEST.get()
        return outputs if info is None else _counted(outputs, info)

    engine.generate = generate


class StreamIntervals:
    """Chooses how many tokens a chunk of a stream carries: vLLM's `stream_interval` of a request.

    Each chunk costs the server processor time. While several streams run, each gets a chunk about every
    `CHUNK_SECONDS`, or with each token where that takes longer. The first token and the last chunk are sent at once.
    """

    CHUNK_SECONDS = 0.02
    LONGEST = 8  # tokens

    def __init__(self) -> None:
        self._running = 0
        self._token_seconds = self.CHUNK_SECONDS  # of recent streams

    def choose(self) -> int:
        """Tokens for the next stream."""
        return max(1, min(self.LONGEST, int(self.CHUNK_SECONDS / self._token_seconds))) if self._running else 1

    async def measure(self, outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """`outputs` of a stream, whose speed the next ones go by."""
        self._running += 1
        tokens, first = 0, 0.0
        try:
            async for output in outputs:
                if not first:
                    first = time.perf_counter()
                else:
                    tokens += max((len(sequence.token_ids) for sequence in output.outputs), default=0)
                yield output
            if tokens:
                self._token_seconds += (max((time.perf_counter() - first) / tokens, 1e-6) - self._token_seconds) / 4
        finally:
            self._running -= 1
            await outputs.aclose()


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
