"""Limits around an application that counts what reaches it: each is 413, 422 or 429, in OpenAI's form."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from vllm.exceptions import VLLMUnprocessableEntityError

from hunyuan_vllm.server.middleware import limits
from hunyuan_vllm.server.middleware.asgi import request_info
from hunyuan_vllm.server.middleware.errors import ErrorHandler
from hunyuan_vllm.server.middleware.limits import Limits, limit_prompts
from hunyuan_vllm.server.options import ApiPolicy

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PLACES = 2


class Application:
    """Stands for vLLM's: reads the whole request, and answers once `go` is set."""

    def __init__(self):
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=PLACES),
            parallel_config=SimpleNamespace(data_parallel_size=1),
        )
        self.state = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=config, generate=None))
        self.bodies: list[bytes] = []
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class Server:
    def __init__(self, **policy):
        self.application = Application()
        self._middleware = Limits(self.application, ApiPolicy(**policy))
        transport = httpx.ASGITransport(self._served)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://server")

    async def started(self):
        await self._served({"type": "lifespan"}, None, None)
        return self

    async def post(self, path=CHAT, content=None, key="alice", **body) -> httpx.Response:
        content = json.dumps(body).encode() if content is None else content
        return await self._client.post(path, content=content, headers={"x-key": key})

    async def _served(self, scope, receive, send):
        if scope["type"] == "http":
            request_info(scope)["key"] = dict(scope["headers"])[b"x-key"].decode()
        await self._middleware({**scope, "app": self.application}, receive, send)


def error_of(answer: httpx.Response, status: int, param: str | None) -> dict:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (status, param)
    return error


async def test_what_is_within_all_limits_passes_unchanged():
    server = Server()
    assert (await server.post(messages=[{"role": "user", "content": "x" * 10_000}], n=3)).status_code == 200
    assert json.loads(server.application.bodies[0])["n"] == 3


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_body_too_large(path, streamed):
    server = Server(max_body=1000)

    async def parts():  # sent without saying the length beforehand
        for _ in range(1001):
            yield b" "

    answer = await server.post(path, content=parts() if streamed else b" " * 1001)
    assert "1000 bytes" in error_of(answer, 413, None)["message"]
    assert server.application.bodies == []
    assert (await server.post(path, content=b" " * 1000)).status_code == 200


@pytest.mark.parametrize(
    ("path", "field"),
    [(CHAT, "max_tokens"), (CHAT, "max_completion_tokens"), ("/v1/responses", "max_output_tokens")],
)
@pytest.mark.parametrize("value", [101, "101", 101.0])
async def test_too_many_tokens_asked_for(path, field, value):
    server = Server(max_output_tokens=100)
    message = error_of(await server.post(path, **{field: value}), 422, field)["message"]
    assert message == f"{field} is 101, and this server generates at most 100 tokens"
    assert (await server.post(path, **{field: 100})).status_code == 200
    assert (await server.post(path, **{field: "many"})).status_code == 200  # vLLM says what is wrong with that


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"n": 9}, "n", "n is 9"),
        ({"n": "9"}, "n", "n is 9"),
        ({"prompt": ["x"] * 3, "n": 3}, "n", "n is 3 for each of 3 prompts"),
        ({"prompt": ["x"] * 9}, "prompt", "each of 9 prompts"),
        ({"prompt": [[1, 2]] * 9}, "prompt", "each of 9 prompts"),
    ],
)
async def test_too_many_sequences(body, field, says):
    server = Server(max_sequences=8)
    message = error_of(await server.post(COMPLETIONS, **body), 422, field)["message"]
    assert says in message and "at most 8" in message


async def test_a_prompt_of_token_ids_is_one_prompt():
    assert (await Server(max_sequences=1).post(COMPLETIONS, prompt=[1, 2, 3])).status_code == 200


async def test_json_too_deep_to_read():
    for depth in (10_000, 1_000_000):
        answer = await Server().post(content=b'{"messages":' + b"[" * depth + b"]" * depth + b"}")
        assert "nested too deeply" in error_of(answer, 400, None)["message"]


async def test_what_is_no_json_is_left_to_vllm():
    server = Server(max_output_tokens=1)
    for content in (b"", b"{", b"null", b"[1]", b"\xff", b'{"n": ' + b"9" * 5000 + b"}"):
        assert (await server.post(content=content)).status_code == 200
    assert len(server.application.bodies) == 6


async def test_requests_of_a_key():
    server = await Server(max_requests_per_key=3, max_queue=0).started()
    server.application.go.clear()
    async with asyncio.TaskGroup() as group:
        under_way = [group.create_task(server.post()) for _ in range(3)]
        await asyncio.sleep(0.05)
        answer = await server.post()
        assert "try again later" in error_of(answer, 429, None)["message"]
        assert answer.headers["retry-after"] == "1"
        others = [group.create_task(server.post(key="bob")), group.create_task(server.post("/tokenize"))]
        await asyncio.sleep(0.05)
        server.application.go.set()
    assert {task.result().status_code for task in under_way + others} == {200}
    assert (await server.post()).status_code == 200  # those that have ended no longer count


async def test_the_queue():
    server = await Server(max_queue=3).started()
    server.application.go.clear()
    async with asyncio.TaskGroup() as group:
        under_way = [group.create_task(server.post(n=n, key=str(n))) for n in (1, 4)]
        await asyncio.sleep(0.05)  # all PLACES and all of the queue are taken
        answer = await server.post()
        assert "3 sequences are waiting" in error_of(answer, 429, None)["message"]
        assert answer.headers["retry-after"] == "1"
        server.application.go.set()
    assert {task.result().status_code for task in under_way} == {200}
    assert (await server.post(n=100)).status_code == 200  # more than ever fit, but nobody else waits


async def test_a_client_that_goes_away_frees_its_place():
    server = await Server(max_requests_per_key=1).started()
    server.application.go.clear()
    task = asyncio.create_task(server.post())
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait([task])
    server.application.go.set()
    assert (await server.post()).status_code == 200


async def test_no_limits():
    server = await Server(
        max_body=0, max_sequences=0, max_requests_per_key=0, max_queue=0, max_output_tokens=0
    ).started()
    assert (await server.post(n=10**6, max_tokens=10**9, user="x" * 20_000_000)).status_code == 200


async def test_a_sender_that_stops(monkeypatch):
    monkeypatch.setattr(limits, "BODY_TIMEOUT", 0.1)

    sent = []
    first = True

    async def receive():
        nonlocal first
        if not first:
            await asyncio.sleep(10)
        first = False
        return {"type": "http.request", "body": b"{", "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    await Limits(Application(), ApiPolicy())(scope, receive, send)
    assert sent[0]["status"] == 408


async def test_a_prompt_too_long():
    asked = []
    engine = SimpleNamespace(generate=lambda prompt, *args, **keywords: asked.append(len(prompt["prompt_token_ids"])))
    limit_prompts(engine, 5)
    engine.generate({"prompt_token_ids": [1] * 5}, None, "id", lora_request=None)
    with pytest.raises(VLLMUnprocessableEntityError, match="the prompt has 6 tokens, and this server takes at most 5"):
        engine.generate({"prompt_token_ids": [1] * 6}, None, "id", lora_request=None)
    assert asked == [5]


async def test_beam_search_is_not_to_be_had_where_prompts_are_limited():
    error_of(await Server(max_prompt_tokens=5).post(use_beam_search=True), 422, "use_beam_search")
    assert (await Server().post(use_beam_search=True)).status_code == 200


async def test_an_answer_of_vllm_s_about_a_prompt_too_long_names_the_field():
    async def refusing(scope, receive, send):
        await receive()
        message = "the prompt has 6 tokens, and this server takes at most 5"
        body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": 422}}).encode()
        await send({"type": "http.response.start", "status": 422, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(Limits(ErrorHandler(refusing), ApiPolicy())), base_url="http://s"
    ) as client:
        answer = await client.post(CHAT, json={"messages": [{"role": "user", "content": "x"}]})
    error = error_of(answer, 422, "messages")
    assert error["message"] == "messages: the prompt has 6 tokens, and this server takes at most 5"


async def test_a_field_that_nothing_reads_is_refused_unless_that_is_switched_off():
    error = error_of(await Server().post(temprature=1), 400, "temprature")
    assert "temperature" in error["message"]
    assert (await Server(ignore_unknown_fields=True).post(temprature=1)).status_code == 200


async def test_what_reaches_the_application_has_the_fields_present_names():
    server = Server()
    assert (await server.post(n=1, guided_choice=["a", "b"])).status_code == 200
    assert json.loads(server.application.bodies[0]) == {"n": 1, "structured_outputs": {"choice": ["a", "b"]}}


async def test_a_grammar_beyond_the_bounds_does_not_reach_the_application():
    server = Server()
    for path in (CHAT, COMPLETIONS, "/v1/responses"):
        error_of(await server.post(path, guided_grammar="x" * 20_000), 400, "structured_outputs.grammar")
    assert server.application.bodies == []
