"""The stream interval that the server chooses: one token alone or on a slow engine, more where streams are fast."""

from types import SimpleNamespace

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams

from hunyuan_vllm.server.middleware import generation
from hunyuan_vllm.server.middleware.generation import follow_generation


class Engine:
    """Generates ten tokens, by a clock of its own, as often as `SamplingParams` ask for an output."""

    def __init__(self) -> None:
        self.now, self.token_seconds = 0.0, 0.01
        self.intervals: list[int | None] = []

    async def generate(self, prompt, params, request_id=""):
        self.intervals.append(params.stream_interval)
        for _ in range(10):
            self.now += self.token_seconds
            yield SimpleNamespace(prompt_token_ids=[1], outputs=[SimpleNamespace(token_ids=[7])])


@pytest.fixture
def engine(monkeypatch):
    made = Engine()
    monkeypatch.setattr(generation.time, "perf_counter", lambda: made.now)
    follow_generation(made)
    return made


def streamed(**fields) -> SamplingParams:
    return SamplingParams(output_kind=RequestOutputKind.DELTA, **fields)


async def run(engine, params: SamplingParams) -> None:
    async for _ in engine.generate("hi", params):
        pass


async def interval_beside_others(engine, params: SamplingParams) -> int | None:
    """Of a stream that starts while another runs."""
    other = engine.generate("hi", streamed())
    await anext(other)
    await run(engine, params)
    await other.aclose()
    return engine.intervals[-1]


@pytest.mark.parametrize(
    ("token_seconds", "interval"),
    [(0.001, 8), (0.0045, 4), (0.008, 2), (0.015, 1), (0.1, 1)],
    ids=lambda value: f"{value:g}",
)
async def test_chunks_come_50_times_a_second(engine, token_seconds, interval):
    engine.token_seconds = token_seconds
    for _ in range(30):
        await run(engine, streamed())
    assert await interval_beside_others(engine, streamed()) == interval


async def test_a_stream_alone_gets_each_token(engine):
    engine.token_seconds = 0.001
    for _ in range(30):
        await run(engine, streamed())
    assert set(engine.intervals) == {1}


async def test_the_first_streams_get_each_token(engine):
    assert await interval_beside_others(engine, streamed()) == 1


async def test_a_request_may_choose(engine):
    engine.token_seconds = 0.001
    for _ in range(30):
        await run(engine, streamed())
    assert await interval_beside_others(engine, streamed(stream_interval=1)) == 1


async def test_answers_in_one_piece_are_left_alone(engine):
    await run(engine, SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY))
    assert engine.intervals == [None]
