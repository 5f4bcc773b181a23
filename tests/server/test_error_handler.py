"""The middleware beside a server: what it leaves alone, and what it makes of any kind of refusal."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from vllm.entrypoints.openai.responses.utils import construct_input_messages

from hunyuan_vllm.envs import KEY_FILE_VARIABLE
from hunyuan_vllm.server.middleware.errors import ErrorHandler, explain
from hunyuan_vllm.server.middleware.limits import Limits
from hunyuan_vllm.server.middleware.stack import BehindKey
from hunyuan_vllm.server.options import ApiPolicy

try:
    from vllm.renderers.chat_utils import _parse_chat_message_content_mm_part as parse_part
except ImportError:  # vLLM 0.33
    from vllm.renderers.chat_utils.chat_message import parse_chat_message_content_mm_part as parse_part

JSON = (b"content-type", b"application/json")
STREAM = (b"content-type", b"text/event-stream")


def answering(status: int, headers: list[tuple[bytes, bytes]], *chunks: bytes):
    """An application that reads the whole request and answers with these chunks."""

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


def handled(app):
    """The application behind the error handler and what gives that the request's body."""
    return Limits(ErrorHandler(app), ApiPolicy(ignore_unknown_fields=True))


async def ask(app, path="/v1/completions", **request) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.post(path, **request)


@pytest.mark.parametrize(
    ("status", "headers", "chunks"),
    [
        (200, [JSON], [b'{"id": ', b"1}"]),
        (200, [STREAM], [b'data: {"id": 1}\n\n', b'data: {"error": "later"}\n\n', b"data: [DONE]\n\n"]),
        (200, [STREAM], [b": keep-alive\n\n", b'data: {"error": {"code": 400}}\n\n']),
        (400, [(b"content-type", b"text/plain")], [b"no ", b"json"]),
        (404, [], []),
        (500, [JSON], [b'{"error": {"message": "boom", "code": 500}}']),
    ],
)
async def test_what_it_leaves_alone(status, headers, chunks):
    app = answering(status, headers, *chunks)
    bare, wrapped = await ask(app, json={"prompt": 5}), await ask(handled(app), json={"prompt": 5})
    assert (wrapped.status_code, wrapped.content) == (bare.status_code, bare.content)
    assert dict(wrapped.headers) == dict(bare.headers)


async def test_a_stream_is_not_held_up():
    """The first part is sent on before there is a second one."""
    sent: list[dict] = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [STREAM]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]

    async def send(message):
        sent.append(message)

    await ErrorHandler(app)({"type": "http", "path": "/v1/completions"}, asyncio.Event().wait, send)
    assert sent[1]["body"] == b"data: 1\n\n"


async def test_a_refused_stream_is_a_refusal():
    message = "n must be at least 1, got 0."
    error = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
    app = answering(200, [STREAM], f"data: {json.dumps(error)}\n\n".encode(), b"data: [DONE]\n\n")
    answer = await ask(handled(app), json={"prompt": "a", "n": 0, "stream": True})
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"] == error["error"] | {"param": "n"}


def failing(how: str):
    """An application that breaks down on a request, as vLLM's own checks do on types that they do not foresee."""

    async def app(scope, receive, send):
        await receive()
        if how == "begun":
            await send({"type": "http.response.start", "status": 200, "headers": [STREAM]})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        if how != "answered":
            raise TypeError("'int' object is not iterable")
        await send({"type": "http.response.start", "status": 500, "headers": [JSON]})
        await send({"type": "http.response.body", "body": b'{"error": {"message": "", "code": 500}}'})

    return app


@pytest.mark.parametrize("how", ["raised", "answered"])
async def test_a_request_that_vllms_checks_break_down_on_is_a_bad_request(how):
    answer = await ask(handled(failing(how)), json={"prompt": "a", "max_tokens": 1, "structured_outputs": 5})
    assert answer.status_code == 400
    assert answer.json()["error"] | {"type": ""} == {
        "message": "structured_outputs should not be 5",
        "type": "",
        "param": "structured_outputs",
        "code": 400,
    }


@pytest.mark.parametrize(
    "read",
    [
        lambda: parse_part("a part that is no object"),
        lambda: construct_input_messages(request_input=["an item that is none"]),
    ],
)
async def test_messages_that_vllm_cannot_read_are_a_bad_request(read):
    async def app(scope, receive, send):
        await receive()
        read()

    with pytest.raises((AssertionError, AttributeError, ValueError, TypeError)):
        await ask(app, "/v1/responses", json={})
    answer = await ask(handled(app), "/v1/responses", json={"input": []})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
    assert "input has content" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("status", "headers", "form"),
    [(500, [JSON], '{{"error": {}}}'), (200, [STREAM], 'data: {{"error": {}}}\n\ndata: [DONE]\n\n')],
)
async def test_a_grammar_that_no_token_fits_is_a_bad_request(status, headers, form):
    error = '{"message": "Internal server error", "type": "InternalServerError", "param": null, "code": 500}'
    app = handled(answering(status, headers, form.format(error).encode()))
    answer = await ask(app, json={"prompt": "a", "structured_outputs": {"json": {"$ref": "#"}}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "structured_outputs")
    assert "no possible token" in answer.json()["error"]["message"]
    assert (await ask(app, json={"prompt": "a"})).status_code == 500


async def test_a_grammar_that_ends_in_the_middle_of_a_stream():
    error = b'data: {"error": {"message": "Internal server error", "type": "X", "param": null, "code": 500}}\n\n'
    app = handled(answering(200, [STREAM], b'data: {"id": 1}\n\n', error + b"data: [DONE]\n\n"))
    begun, told, done, _ = (await ask(app, json={"prompt": "a", "response_format": {"type": "x"}})).text.split("\n\n")
    assert (begun, done) == ('data: {"id": 1}', "data: [DONE]")
    told = json.loads(told.removeprefix("data: "))["error"]
    assert (told["code"], told["param"]) == (400, "response_format")
    assert error.decode() in (await ask(app, json={"prompt": "a"})).text


async def test_a_failure_of_the_server_stays_one():
    answer = await ask(handled(failing("answered")), json={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "")
    with pytest.raises(TypeError):
        await ask(handled(failing("raised")), json={"prompt": "a"})
    with pytest.raises(TypeError):
        await ask(handled(failing("begun")), json={"prompt": "a", "structured_outputs": 5})


async def test_the_request_may_come_in_parts():
    async def parts():
        for part in (b'{"pro', b'mpt": ', b"5}"):
            yield part

    app = answering(400, [JSON], b'{"error": {"message": "dump", "param": "body.prompt", "code": 400}}')
    answer = await ask(handled(app), content=parts())
    assert answer.json()["error"]["param"] == "prompt"
    assert "prompt should be" in answer.json()["error"]["message"]


async def test_one_class_for_both(tmp_path, monkeypatch):
    key = tmp_path / "key"
    key.write_text("secret\n")
    key.chmod(0o600)
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(key))
    layers = BehindKey(answering(404, [JSON], b'{"detail": "Not Found"}'))
    engine = SimpleNamespace(errored=False)

    async def app(scope, receive, send):
        in_vllm = SimpleNamespace(state=SimpleNamespace(engine_client=engine))
        await layers({**scope, "app": in_vllm}, receive, send)

    assert (await ask(app, "/v1/x")).status_code == 401
    answer = await ask(app, "/v1/x", headers={"Authorization": "Bearer secret"})
    error = answer.json()["error"]
    assert "--allow-route /v1/x" in error.pop("message")
    assert error == {"type": "Not Found", "param": None, "code": 404}


@pytest.mark.parametrize(
    ("message", "field", "body", "expected", "says"),
    [
        ("top_k must be 0, got -5.", None, {"top_k": -5}, "top_k", "top_k must be 0, got -5."),
        ("`n` is odd. (parameter=n, value=3)", "n", {"n": 3}, "n", "`n` is odd."),
        (
            "maximum context length is 8",
            "input_tokens",
            {"prompt": "a"},
            "prompt",
            "prompt: maximum context length is 8",
        ),
        ("Requested sample logprobs of 9", "logprobs", {"logprobs": 9}, "logprobs", "Requested sample logprobs of 9"),
        (
            "Token id 9 is\nout of vocabulary",
            None,
            {"prompt": [9]},
            "prompt",
            "prompt: Token id 9 is out of vocabulary",
        ),
        ("something else", None, {"prompt": "a"}, None, "something else"),
    ],
)
def test_explain(message, field, body, expected, says):
    problem = explain(message, field, body)
    assert (problem.field, problem.message) == (expected, says)
