"""ASGI middleware (vLLM's --middleware) for the error answers of the OpenAI endpoints: the field is always named.

A good request passes untouched; its body is kept only until the answer starts.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ValidationError

from hunyuan_vllm.server.asgi import App, Message, Receive, Scope, Send
from hunyuan_vllm.server.bad_requests import Problem, explain, explain_validation

__all__ = ["NameFields"]

STREAMED_ERROR = b'data: {"error"'
ABOUT_THE_REQUEST = (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class NameFields:
    """Rewrites {"error": …} answers with status 400 or 422, and gives that form to others of status 4xx."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope["path"], receive, send)
        await self._app(scope, exchange.receive, exchange.send)


class _Exchange:
    """One request and its answer. The start of an answer is held back until it is known to be no error."""

    def __init__(self, path: str, receive: Receive, send: Send) -> None:
        self._path, self._receive, self._send = path, receive, send
        self._request: list[bytes] = []
        self._answer: list[bytes] = []
        self._start: Message | None = None
        self._ended = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._request.append(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if self._ended:
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        body = message.get("body", b"")
        if self._start is None:
            await self._send(message)
        elif body.startswith(STREAMED_ERROR):
            # vLLM begins a stream before the engine has looked at the request. Nothing has been sent of it yet.
            await self._refuse(self._start, body.split(b"\n", 1)[0].removeprefix(b"data: "))
        elif HTTPStatus.BAD_REQUEST <= self._start["status"] < HTTPStatus.INTERNAL_SERVER_ERROR:
            self._answer.append(body)
            if not message.get("more_body", False):
                await self._refuse(self._start, b"".join(self._answer))
        else:
            await self._send(self._start)
            await self._send(message)
            self._start = None
            self._request.clear()

    async def _refuse(self, start: Message, body: bytes) -> None:
        self._ended = True
        if error := _error_of(body, start["status"]):
            if error["code"] in ABOUT_THE_REQUEST and self._path in (CHAT, COMPLETIONS):
                problem = _problem(self._path, b"".join(self._request), str(error.get("message")), error.get("param"))
                error |= {"message": problem.message, "param": problem.field}
            body = json.dumps({"error": error}, ensure_ascii=False).encode()
            own = {b"content-length": str(len(body)).encode(), b"content-type": b"application/json"}
            headers = [header for header in start["headers"] if header[0].lower() not in own]
            start = {**start, "status": error["code"], "headers": headers + list(own.items())}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})


def _error_of(answer: bytes, status: int) -> dict[str, Any] | None:
    """The error in an answer, in OpenAI's form; None if the answer is not JSON."""
    try:
        content = json.loads(answer)
    except ValueError:
        return None
    error = content.get("error") if isinstance(content, dict) else None
    if isinstance(error, dict) and isinstance(error.get("code"), int):
        return error
    phrase = HTTPStatus(status).phrase
    detail = content.get("detail", phrase) if isinstance(content, dict) else phrase
    return {"message": str(detail), "type": phrase, "param": None, "code": status}


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
