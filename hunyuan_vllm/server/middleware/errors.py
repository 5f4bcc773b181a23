"""Errors in the form that clients expect, with the field of the request they are about"""

import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from traceback import walk_tb
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from hunyuan_vllm.server.middleware.asgi import (
    ANTHROPIC,
    BODY,
    App,
    Message,
    Receive,
    Scope,
    Send,
    error_body,
    refuse,
    request_info,
)
from hunyuan_vllm.server.middleware.fields import request_model

MAX_SHOWN = 60  # characters of a wrong value in a message
ENGINE_ERROR = "Internal server error"  # vLLM's GenerationError
# The code of vLLM that reads a conversation: a module (a package since 0.33), and one function of another.
MESSAGES_READER = "vllm.renderers.chat_utils"
INPUT_READER = ("vllm.entrypoints.openai.responses.utils", "construct_input_messages")
LOAD_ADAPTER = "/v1/load_lora_adapter"
# How vLLM's engine and executor report an error while an adapter loads.
ADAPTER_REFUSED = re.compile(
    r"Call to add_lora method failed: (Worker failed with error ['\"])?(?P<reason>.*?)(['\"], please check the|$)",
    re.DOTALL,
)
CONSTRAINTS = ("structured_outputs", "response_format", "tools", "text")
SHOULD_BE = "Input should be "
PYTHON_TYPE = re.compile(r"dictionary( or (instance of \w+|object to extract fields from))?")
VLLM_SUFFIX = re.compile(r" \(parameter=.*\)$", re.DOTALL)
# Errors that vLLM reports without a field, or under a name that is not a field, and the fields they are about.
UNNAMED = (
    (re.compile("maximum context length|this server takes at most"), ("messages", "prompt")),
    (re.compile("chat template|multimodal|Unknown role|text only"), ("messages",)),
    (re.compile("out of vocabulary|at least one prompt"), ("prompt",)),
    (re.compile("sample logprobs"), ("top_logprobs", "logprobs")),
    (re.compile("[Gg]rammar|schema|regex"), ("structured_outputs", "response_format")),
    (re.compile("structural tag"), ("structured_outputs", "response_format", "tools")),
    (re.compile("tool choice"), ("tool_choice", "tools")),
)


class Problem(NamedTuple):
    """An error in a request, and its field, such as "temperature" or "messages.0.role"; None if it is not in one."""

    field: str | None
    message: str


def explain(message: str, field: str | None, body: Mapping[str, Any]) -> Problem:
    """vLLM's `message` about the request `body`, tidied, with the field it is about."""
    message = " ".join(VLLM_SUFFIX.sub("", message).split())
    first_word = message.split(" ", 1)[0].strip("`")
    if field is None and first_word in body:
        field = first_word
    for pattern, fields in UNNAMED:
        if pattern.search(message):
            field = next((name for name in fields if name in body), field)
    if field in (None, "messages") and "messages" in body and (problem := _messages_problem(body)):
        return problem
    if field is not None and not re.search(rf"\b{re.escape(field)}\b", message):
        message = f"{field}: {message}"
    return Problem(field, message)


def explain_validation(error: ValidationError, body: Mapping[str, Any]) -> Problem:
    """The error behind pydantic's about the request `body`."""
    problem = _furthest(error, body)
    if problem.field and problem.field.split(".")[0] == "messages":
        return _messages_problem(body) or problem
    return problem


def explain_crash(model: type[BaseModel], body: Mapping[str, Any]) -> Problem | None:
    """The field on which `model`'s own checks of `body` crash, as vLLM's do on unexpected types.

    None if they do not crash: the request is then not the cause.
    """
    if not _crashes(model, body):
        return None
    fields = sorted(body, key=lambda name: name in model.model_fields and model.model_fields[name].is_required())
    for field in fields:
        if not _crashes(model, {name: value for name, value in body.items() if name != field}):
            return Problem(field, f"{field} should not be {_shown(body[field])}")
    return Problem(None, "the request's fields have wrong types")


def constraint(body: Mapping[str, Any]) -> str | None:
    """The field that constrains which tokens may follow, if there is one."""
    return next((name for name in CONSTRAINTS if body.get(name)), None)


def explain_dead_end(message: str, field: str | None) -> Problem | None:
    """A failure of the engine that the constraint in `field` may have caused by allowing no token; else None.

    vLLM reports it like any failure of the engine, without mentioning the grammar.
    """
    if message != ENGINE_ERROR or field is None:
        return None
    return Problem(
        field, f"{field} took too long to compile, or leaves no possible token together with the request's other fields"
    )


def explain_adapter(path: str, message: str) -> Problem | None:
    """Why an adapter could not be loaded, if that is what the engine reported; else None."""
    if path != LOAD_ADAPTER or not (match := ADAPTER_REFUSED.search(message)):
        return None
    return Problem("lora_path", f"lora_path: {match['reason']}")


def explain_unread(error: Exception, body: Mapping[str, Any]) -> Problem | None:
    """That the messages have an unknown form, if vLLM failed while it read them; else None."""
    passed = {(frame.f_globals.get("__name__"), frame.f_code.co_name) for frame, _ in walk_tb(error.__traceback__)}
    if INPUT_READER not in passed and not any(f"{module}.".startswith(f"{MESSAGES_READER}.") for module, _ in passed):
        return None
    field = next((name for name in ("messages", "input") if name in body), None)
    return Problem(field, f"{field or 'the request'} has content of an unknown type or form")


def _crashes(model: type[BaseModel], body: Mapping[str, Any]) -> bool:
    try:
        model.model_validate(body)
    except ValidationError:
        return False
    except Exception:
        return True
    return False


def _furthest(error: ValidationError, body: Mapping[str, Any]) -> Problem:
    """Of all the types that pydantic tried, the errors of those that got furthest into the request."""
    entries = error.errors(include_url=False)
    paths = [_path(entry["loc"], entry["type"], body) for entry in entries]
    path = max(paths, key=len)
    found = [entry for entry, at in zip(entries, paths, strict=True) if at == path]
    field = ".".join(path)
    reasons = list(dict.fromkeys(PYTHON_TYPE.sub("object", entry["msg"]) for entry in found))
    if found[0]["type"] == "missing":
        return Problem(field, f"{field} is required")
    if all(reason.startswith(SHOULD_BE) for reason in reasons):
        wanted = " or ".join(reason.removeprefix(SHOULD_BE) for reason in reasons)
        return Problem(field or None, f"{field or 'the request'} should be {wanted}, not {_shown(found[0]['input'])}")
    return Problem(field or None, f"{field or 'the request'}: {'; '.join(reasons)}")


def _path(location: Sequence[int | str], kind: str, body: Any) -> tuple[str, ...]:
    """The steps of a pydantic location that exist in the request, without the names of types."""
    path = []
    for step in location:
        children = dict(enumerate(body)) if isinstance(body, list) else body
        if isinstance(children, dict) and step in children:
            path.append(str(step))
            body = children[step]
    return (*path, str(location[-1])) if kind == "missing" else tuple(path)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


class _TextPart(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[_TextPart] | None = None


class _Conversation(BaseModel):
    messages: list[_Message] = Field(min_length=1)


def _messages_problem(body: Mapping[str, Any]) -> Problem | None:
    """What is wrong with the messages, given what the model's chat template accepts."""
    try:
        _Conversation.model_validate(body)
    except ValidationError as error:
        return _furthest(error, body)
    return None


STREAMED_ERROR = b'data: {"error"'
ABOUT_THE_REQUEST = (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class ErrorHandler:
    """Gives vLLM's errors (4xx) one form, with the field they are about.

    A failure of the server (500) becomes 400 if the request causes it. Reads the request from its info, where Limits
    puts it.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, send)
        try:
            await self._app(scope, receive, answer.send)
        except Exception as error:
            problem = answer.explain_failure(error)
            if problem is None:
                raise
            await refuse(scope, send, HTTPStatus.BAD_REQUEST, problem.message, problem.field)


class _Answer:
    """The answer to one request. Its start is held back until it is known not to be an error."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._path, self._info, self._send = scope["path"], request_info(scope), send
        self._parts: list[bytes] = []
        self._start: Message | None = None
        self._begun = self._ended = False
        self._constraint: str | None = None  # the field of the request that constrains what is streamed

    async def send(self, message: Message) -> None:
        if self._ended:
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        body = message.get("body", b"")
        if self._start is None:
            if self._constraint and body.startswith(STREAMED_ERROR):
                message = {**message, "body": _name_constraint(body, self._constraint)}
            await self._send(message)
        elif body.startswith(STREAMED_ERROR):
            # vLLM starts a stream before the engine has seen the request. Nothing of it has been sent yet.
            await self._send_error(self._start, body.split(b"\n", 1)[0].removeprefix(b"data: "))
        elif HTTPStatus.BAD_REQUEST <= self._start["status"] <= HTTPStatus.INTERNAL_SERVER_ERROR:
            self._parts.append(body)
            if not message.get("more_body", False):
                await self._send_error(self._start, b"".join(self._parts))
        else:
            await self._send(self._start)
            await self._send(message)
            self._start, self._begun = None, True
            self._constraint = constraint(self._request() or {}) if message.get("more_body") else None
            self._info.pop(BODY, None)  # not kept in memory during a stream

    def explain_failure(self, error: Exception | None = None) -> Problem | None:
        """What is wrong with a request that the application failed on; None if nothing is, or the answer has begun."""
        if self._begun or (request := self._request()) is None or (model := request_model(self._path)) is None:
            return None
        return explain_crash(model, request) or (explain_unread(error, request) if error else None)

    def _request(self) -> dict[str, Any] | None:
        try:
            request = json.loads(self._info.get(BODY, b""))
        except ValueError:
            return None
        return request if isinstance(request, dict) else None

    async def _send_error(self, start: Message, answer: bytes) -> None:
        self._ended = True
        error = _error_of(answer, start["status"])
        if error and error["code"] == HTTPStatus.INTERNAL_SERVER_ERROR:
            field, message = constraint(self._request() or {}), str(error.get("message"))
            problem = self.explain_failure() or explain_dead_end(message, field) or explain_adapter(self._path, message)
            if problem:
                error = _bad_request(problem)
            elif start["status"] == error["code"]:
                error = None  # unchanged
        elif error and error["code"] in ABOUT_THE_REQUEST and self._path in (CHAT, COMPLETIONS, *ANTHROPIC):
            body = self._info.get(BODY, b"")
            problem = _problem(self._path, body, str(error.get("message")), error.get("param"))
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


def _name_constraint(chunk: bytes, field: str) -> bytes:
    """A chunk with an error in the middle of a stream, which names the constraint if that may have caused it."""
    line, _, rest = chunk.partition(b"\n")
    error = _error_of(line.removeprefix(b"data: "), HTTPStatus.INTERNAL_SERVER_ERROR)
    if error is None or (problem := explain_dead_end(str(error["message"]), field)) is None:
        return chunk
    return b"data: " + json.dumps({"error": _bad_request(problem)}).encode() + b"\n" + rest


def _problem(path: str, request: bytes, message: str, param: str | None) -> Problem:
    """What is wrong with `request`, about which vLLM says `message`."""
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
    except Exception:  # raised by vLLM's own checks, and in its message
        pass
    return Problem(param, message) if path in ANTHROPIC else explain(message, param, body)
