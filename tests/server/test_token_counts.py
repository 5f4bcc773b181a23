"""Tokens by key: in /metrics and in the log's line of a request, streamed, cut off or answered at once."""

import asyncio
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from hunyuan_vllm.server.middleware.access_log import AccessLog
from hunyuan_vllm.server.middleware.asgi import request_info
from hunyuan_vllm.server.middleware.generation import count_tokens


class Engine:
    """Yields what vLLM's engine does: a part of an answer at a time. Notes how each generation ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    async def generate(self, prompt, parts, sequences=1):
        try:
            for part in parts:
                given = [SimpleNamespace(token_ids=[7] * part) for _ in range(sequences)]
                yield SimpleNamespace(prompt_token_ids=[1] * prompt, outputs=given)
            self.ended.append("finished")
        except GeneratorExit:
            self.ended.append("aborted")
            raise


@pytest.fixture
def engine():
    made = Engine()
    count_tokens(made)
    return made


def counted(key: str) -> tuple[float, float]:
    names = ("hunyuan_prompt_tokens_total", "hunyuan_generated_tokens_total")
    return tuple(REGISTRY.get_sample_value(name, {"key": key}) or 0.0 for name in names)


async def request(answer, key: str | None, path: str = "/v1/completions", quiet: tuple[str, ...] = ()) -> dict:
    """A request through the log, `answer` being what the application does; returns the notes on it."""
    scope = {"type": "http", "method": "POST", "path": path, "headers": []}

    async def application(scope, receive, send):
        if key is not None:
            request_info(scope)["key"] = key
        await answer()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message):
        pass

    await AccessLog(application, quiet)(scope, None, send)
    return request_info(scope)


async def test_whole_and_streamed_answers(engine):
    async def answer():
        for prompt, parts, sequences in ((5, [3], 2), (4, [1, 1, 2], 1)):
            async for _ in engine.generate(prompt, parts, sequences=sequences):
                pass

    before = counted("alice")
    found = await request(answer, "alice")
    assert (found["prompt_tokens"], found["generated_tokens"]) == (9, 10)
    assert [after - was for after, was in zip(counted("alice"), before, strict=True)] == [9, 10]
    assert engine.ended == ["finished", "finished"]


async def test_a_client_that_goes_away_has_had_some(engine):
    async def answer():
        stream = engine.generate(3, [1] * 100)
        await anext(stream)
        await anext(stream)
        await stream.aclose()

    found = await request(answer, "bob")
    assert (found["prompt_tokens"], found["generated_tokens"]) == (3, 2)
    assert engine.ended == ["aborted"]


async def test_a_task_of_the_request_counts_for_it(engine):
    """vLLM answers in tasks of its own, to hear of a client that goes away."""

    async def generated():
        async for _ in engine.generate(2, [4]):
            pass

    async def answer():
        await asyncio.create_task(generated())

    found = await request(answer, None)
    assert (found["prompt_tokens"], found["generated_tokens"]) == (2, 4)
    assert counted("-") >= (2, 4)


async def test_several_prompts_are_noted_before_their_generators_are_closed(engine):
    streams = []

    async def answer():
        streams.extend([engine.generate(2, [3]), engine.generate(4, [5])])
        for stream in streams:
            await anext(stream)

    found = await request(answer, "alice")
    assert (found["prompt_tokens"], found["generated_tokens"]) == (6, 8)
    for stream in streams:
        await stream.aclose()


async def test_probes_count_for_nobody(engine):
    async def answer():
        async for _ in engine.generate(2, [4]):
            pass

    before = counted("-")
    assert "prompt_tokens" not in await request(answer, None, "/readyz", quiet=("/readyz",))
    assert counted("-") == before


async def test_the_log_says_it(engine, caplog_vllm):
    async def answer():
        async for _ in engine.generate(2, [4]):
            pass

    await request(answer, "alice")
    assert "prompt_tokens=2 generated_tokens=4" in caplog_vllm.text
