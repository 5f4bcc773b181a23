"""Keeping the engine full, and every way a run can end."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.v1.engine.exceptions import EngineGenerateError

from hunyuan_vllm.batch import engine
from hunyuan_vllm.batch.output import Settings
from hunyuan_vllm.batch.requests import BadLine, Request
from hunyuan_vllm.batch.runner import Runner
from hunyuan_vllm.server.middleware.errors import Problem
from hunyuan_vllm.util.jsonl import Line

BAD = BadLine(Problem("prompt", "prompt: empty"))


def requests(count: int, bad: tuple[int, ...] = ()):
    for number in range(1, count + 1):
        line = Line(number, {"prompt": str(number)})
        yield line, BAD if number in bad else Request(line, CompletionRequest(prompt=str(number)))


def response(text: str) -> CompletionResponse:
    choice = {"index": 0, "text": text, "finish_reason": "stop"}
    return CompletionResponse(model="m", choices=[choice], usage=UsageInfo(completion_tokens=len(text)))


class Engine:
    """Answers when told to; remembers how many requests were with it at a time."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future] = []
        self.most = 0
        self.now = 0

    async def answer(self, request: Request) -> CompletionResponse:
        self.now += 1
        self.most = max(self.most, self.now)
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        try:
            await future
        finally:
            self.now -= 1
        return response(f"answer to {request.line.number}")

    async def release(self, count: int | None = None) -> None:
        await asyncio.sleep(0.05)
        ready, self.waiting = self.waiting[:count], self.waiting[count or len(self.waiting) :]
        for future in ready:
            future.set_result(None)

    async def release_for_ever(self) -> None:
        while True:
            await self.release()


class Written(list):
    """What a run has written, as parsed records."""

    def write(self, records) -> None:
        self.extend(json.loads(record.text) for record in records)

    @property
    def lines(self) -> list[int]:
        return sorted(record["line"] for record in self)


@pytest.fixture
def written() -> Written:
    return Written()


def runner(answer, written, window=4) -> Runner:
    return Runner(answer, Settings("m"), written.write, window)


async def test_the_window_is_full_and_every_line_is_written_once(written):
    engine = Engine()
    releasing = asyncio.create_task(engine.release_for_ever())
    await runner(engine.answer, written).run(requests(11, bad=(6, 10)))
    releasing.cancel()
    assert engine.most == 4
    assert written.lines == list(range(1, 12))
    for record in written:
        assert record["input"] == {"prompt": str(record["line"])}
        if record["line"] in (6, 10):
            assert record["error"]["message"] == "prompt: empty"
        else:
            assert record["outputs"] == [{"text": f"answer to {record['line']}", "finish_reason": "stop"}]
            assert record["error"] is None


async def test_an_answered_line_is_written_while_others_run(written):
    engine = Engine()
    running = asyncio.create_task(runner(engine.answer, written).run(requests(3)))
    await engine.release(1)
    await asyncio.sleep(0.5)
    assert written.lines == [1]
    await engine.release()
    await running
    assert written.lines == [1, 2, 3]


async def test_a_request_the_engine_refuses_is_a_failed_line(written):
    async def refuse(request):
        raise BadLine(Problem("messages", "messages: too long"), "BadRequestError", 400)

    await runner(refuse, written).run(requests(2))
    expected = {"message": "messages: too long", "type": "BadRequestError", "param": "messages", "code": 400}
    assert [record["error"] for record in written] == [expected] * 2


async def test_drain_finishes_what_is_in_flight_and_starts_nothing(written):
    engine = Engine()
    run = runner(engine.answer, written)
    running = asyncio.create_task(run.run(requests(100)))
    await asyncio.sleep(0.05)
    assert run.in_flight == 4
    run.drain()
    await engine.release()
    await asyncio.wait_for(running, 5)
    assert written.lines == [1, 2, 3, 4]


@pytest.mark.parametrize("answers_cancellation", [False, True])
async def test_drop_ends_at_once_and_writes_nothing_of_the_dropped(written, answers_cancellation):
    """vLLM's handlers answer a cancelled request with an error; that is no error of the line."""
    engine = Engine()

    async def answer(request):
        try:
            return await engine.answer(request)
        except asyncio.CancelledError:
            if answers_cancellation:
                raise BadLine(Problem(None, "Client disconnected")) from None
            raise

    run = runner(answer, written)
    running = asyncio.create_task(run.run(requests(100)))
    await engine.release(1)
    await asyncio.sleep(0.4)
    run.drop()
    await asyncio.wait_for(running, 5)
    assert written.lines == [1]


async def test_the_end_of_the_engine_ends_the_run_and_keeps_the_answers(written):
    async def answer(request):
        if request.line.number == 3:
            await asyncio.sleep(0.05)
            raise RuntimeError("engine is dead")
        if request.line.number > 3:
            await asyncio.sleep(60)
        return response("yes")

    with pytest.raises(RuntimeError, match="engine is dead"):
        await asyncio.wait_for(runner(answer, written).run(requests(100)), 5)
    assert written.lines == [1, 2]


async def test_a_full_disk_ends_the_run():
    def write(records):
        raise OSError(28, "No space left on device")

    async def answer(request):
        return response("yes")

    with pytest.raises(OSError, match="No space left"):
        await asyncio.wait_for(Runner(answer, Settings("m"), write, 4).run(requests(100)), 5)


class Completions(OpenAIServingCompletion):
    """vLLM's, with `generate` in place of an engine."""

    enable_prompt_tokens_details = enable_per_request_metrics = return_tokens_as_token_ids = False
    system_fingerprint = None

    def __init__(self, generate) -> None:
        self.generate = generate

    async def create_completion(self, request):
        output = await self.generate()
        return self.request_output_to_completion_response([output], request, "id", 0, "m", None, SimpleNamespace())


def answering(generate) -> engine.Engine:
    state = SimpleNamespace(openai_serving_chat=None, openai_serving_completion=Completions(generate))
    return engine.Engine(SimpleNamespace(errored=False), state)


async def test_a_failure_that_vllm_wraps_without_a_message_is_named():
    async def generate():
        raise EngineGenerateError() from RuntimeError("no such kernel")

    ((_, request),) = requests(1)
    with pytest.raises(BadLine, match=r"RuntimeError\('no such kernel'\)") as raised:
        await answering(generate).answer(request)
    assert raised.value.code == 500
