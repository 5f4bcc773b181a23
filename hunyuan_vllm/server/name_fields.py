"""ASGI middleware (vLLM's --middleware) for the error answers of the OpenAI endpoints: the field is always named.

A good request passes untouched; its body is kept only until the answer starts.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError

from hunyuan_vllm.server.asgi import ANTHROPIC, App, Message, Receive, Scope, Send, error_body, refuse
from hunyuan_vllm.server.bad_requests import (
    Problem,
    constraint,
    explain,
    explain_adapter,
    explain_crash,
    explain_dead_end,
    explain_unread,
    explain_validation,
)
from hunyuan_vllm.server.request_fields import request_model

__all__ = ["NameFields"]

STREAMED_ERROR = b'data: {"error"'
ABOUT_THE_REQUEST = (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class NameFields:
    """Rewrites {"error": …} answers with status 400 or 422, and gives that form to others of status 4xx.

    A failure of the server (500) is 400 where it is the request that vLLM's checks break down on.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope["path"], receive, send)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            problem = exchange.crash(error)
            if problem is None:
                raise
            await refuse(scope, send, HTTPStatus.BAD_REQUEST, problem.message, problem.field)


class _Exchange:
    """One request and its answer. The start of an answer is held back until it is known to be no error."""

    def __init__(self, path: str, receive: Receive, send: Send) -> None:
        self._path, self._receive, self._send = path, receive, send
        self._request: list[bytes] = []
        self._answer: list[bytes] = []
        self._start: Message | None = None
        self._begun = self._ended = False
        self._constraint: str | None = None  # the field of the request that constrains what is streamed

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
            if self._constraint and body.startswith(STREAMED_ERROR):
                message = {**message, "body": _blaming(body, self._constraint)}
            await self._send(message)
        elif body.startswith(STREAMED_ERROR):
            # vLLM begins a stream before the engine has looked at the request. Nothing has been sent of it yet.
            await self._refuse(self._start, body.split(b"\n", 1)[0].removeprefix(b"data: "))
        elif HTTPStatus.BAD_REQUEST <= self._start["status"] <= HTTPStatus.INTERNAL_SERVER_ERROR:
            self._answer.append(body)
            if not message.get("more_body", False):
                await self._refuse(self._start, b"".join(self._answer))
        else:
            await self._send(self._start)
            await self._send(message)
            self._start, self._begun = None, True
            self._constraint = constraint(self._body() or {}) if message.get("more_body") else None
            self._request.clear()

    def crash(self, error: Exception | None = None) -> Problem | None:
        """What is wrong with a request that the application failed on; None if nothing is, or an answer has begun."""
        if self._begun or (body := self._body()) is None or (model := request_model(self._path)) is None:
            return None
        return explain_crash(model, body) or (explain_unread(error, body) if error else None)

    def _body(self) -> dict[str, Any] | None:
        try:
            body = json.loads(b"".join(self._request))
        except ValueError:
            return None
        return body if isinstance(body, dict) else None

    async def _refuse(self, start: Message, answer: bytes) -> None:
        self._ended = True
        error = _error_of(answer, start["status"])
        if error and error["code"] == HTTPStatus.INTERNAL_SERVER_ERROR:
            field = constraint(self._body() or {})
            said = str(error.get("message"))
            if problem := self.crash() or explain_dead_end(said, field) or explain_adapter(self._path, said):
                error = _bad_request(problem)
            elif start["status"] == error["code"]:
                error = None  # as it is
        elif error and error["code"] in ABOUT_THE_REQUEST and self._path in (CHAT, COMPLETIONS, *ANTHROPIC):
            problem = _problem(self._path, b"".join(self._request), str(error.get("message")), error.get("param"))
            error |= {"message": problem.message, "param": problem.field}
        if error or self._path in ANTHROPIC:
            error = error or _error_of(answer, start["status"]) or _error_of(b"{}", start["status"])
            assert error is not None
            if self._path in ANTHROPIC:
                answer = error_body(self._path, error["code"], str(error["message"]))
            else:
                answer = json.dumps({"error": error}, ensure_ascii=False).encode()
            own = {b"content-length": str(len(answer)).encode(), b"content-type": b"application/json"}
            headers = [header for header in start["headers"] if header[0].lower() not in own]
            start = {**start, "status": error["code"], "headers": headers + list(own.items())}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": answer})


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
    if isinstance(error, dict) and isinstance(error.get("message"), str):  # in Anthropic's form
        return {"message": error["message"], "type": phrase, "param": None, "code": status}
    detail = content.get("detail", phrase) if isinstance(content, dict) else phrase
    return {"message": str(detail), "type": phrase, "param": None, "code": status}


def _bad_request(problem: Problem) -> dict[str, Any]:
    status = HTTPStatus.BAD_REQUEST
    return {"message": problem.message, "type": status.phrase, "param": problem.field, "code": int(status)}


def _blaming(chunk: bytes, field: str) -> bytes:
    """A chunk with an error in the middle of a stream; about the constraint, where that may be behind it."""
    line, _, rest = chunk.partition(b"\n")
    error = _error_of(line.removeprefix(b"data: "), HTTPStatus.INTERNAL_SERVER_ERROR)
    if error is None or (problem := explain_dead_end(str(error["message"]), field)) is None:
        return chunk
    return b"data: " + json.dumps({"error": _bad_request(problem)}).encode() + b"\n" + rest


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
    model = request_model(path)
    assert model is not None
    try:
        model.model_validate(body)
    except ValidationError as error:
        return explain_validation(error, body)
    except Exception:  # what vLLM's own checks raise: its message says it
        pass
    return Problem(param, message) if path in ANTHROPIC else explain(message, param, body)
