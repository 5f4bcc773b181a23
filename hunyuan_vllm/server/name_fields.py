"""ASGI middleware (vLLM's --middleware) for the error answers of the OpenAI endpoints: the field is always named.

A good request passes untouched; its body is kept only until the answer starts.
"""

from __future__ import annotations

import json
from http import HTTPStatus

from pydantic import BaseModel, ValidationError

from hunyuan_vllm.server.auth import App, Receive, RequireApiKey, Scope, Send
from hunyuan_vllm.server.bad_requests import Problem, explain, explain_validation

__all__ = ["NameFields", "NameFieldsBehindKey"]

Message = Scope  # both are plain mappings
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class NameFields:
    """Rewrites {"error": …} answers with status 400, and gives that form to others of status 4xx."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope["path"], receive, send)
        await self._app(scope, exchange.receive, exchange.send)


class NameFieldsBehindKey(RequireApiKey):
    """The same for those with the key; one class, because vLLM warns of a second --middleware."""

    def __init__(self, app: App) -> None:
        super().__init__(NameFields(app))


class _Exchange:
    """One request and its answer; an answer with an error is held back until it is complete."""

    def __init__(self, path: str, receive: Receive, send: Send) -> None:
        self._path, self._receive, self._send = path, receive, send
        self._request: list[bytes] = []
        self._answer: list[bytes] = []
        self._start: Message | None = None

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._request.append(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if HTTPStatus.BAD_REQUEST <= message["status"] < HTTPStatus.INTERNAL_SERVER_ERROR:
                self._start = message
                return
            self._request.clear()
        if self._start is None:
            await self._send(message)
            return
        self._answer.append(message.get("body", b""))
        if not message.get("more_body", False):
            await self._send_error(self._start)

    async def _send_error(self, start: Message) -> None:
        body = _rewritten(self._path, start["status"], b"".join(self._request), b"".join(self._answer))
        headers = [header for header in start["headers"] if header[0] != b"content-length"]
        await self._send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})


def _rewritten(path: str, status: int, request: bytes, answer: bytes) -> bytes:
    try:
        content = json.loads(answer)
    except ValueError:
        return answer
    if not isinstance(content, dict):
        return answer
    error = content.get("error")
    if not isinstance(error, dict):
        phrase = HTTPStatus(status).phrase
        error = {"message": str(content.get("detail", phrase)), "type": phrase, "param": None, "code": status}
    if status == HTTPStatus.BAD_REQUEST and path in (CHAT, COMPLETIONS):
        problem = _problem(path, request, str(error.get("message")), error.get("param"))
        error |= {"message": problem.message, "param": problem.field}
    return json.dumps({"error": error}, ensure_ascii=False).encode()


def _problem(path: str, request: bytes, message: str, param: str | None) -> Problem:
    """What is wrong with `request`, of which vLLM says `message`."""
    if "Unsupported Media Type" in message:
        return Problem("Content-Type", "Content-Type should be application/json")
    try:
        body = json.loads(request)
    except ValueError as error:
        return Problem(None, f"the request's body is not JSON: {error}")
    if not isinstance(body, dict):
        return Problem(None, "the request's body is not a JSON object")
    try:
        _model(path).model_validate(body)
    except ValidationError as error:
        return explain_validation(error, body)
    except Exception:  # what vLLM's own checks raise: its message says it
        pass
    return explain(message, param, body)


def _model(path: str) -> type[BaseModel]:
    if path == CHAT:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        return ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    return CompletionRequest
