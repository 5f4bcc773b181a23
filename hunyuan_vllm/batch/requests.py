"""The requests of a batch and the records of their results"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hunyuan_vllm.batch.lines import Index, Line, read_lines
from hunyuan_vllm.server.middleware.errors import Problem, explain, explain_validation

if TYPE_CHECKING:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class BadLine(Exception):
    """A line that gets an error instead of an answer."""

    def __init__(self, problem: Problem, kind: str = "BadRequestError", code: int = 400) -> None:
        super().__init__(problem.message)
        self.problem, self.kind, self.code = problem, kind, code


@dataclass(frozen=True)
class Request:
    """A line and what vLLM is asked for it."""

    line: Line
    body: ChatCompletionRequest | CompletionRequest


class Requests:
    """The requests of an input file, completed with the run's defaults.

    Args:
        path: the input file.
        index: what it holds.
        defaults: fields for the lines that leave them out; a seed is increased by the line's number.
    """

    def __init__(self, path: Path, index: Index, defaults: Mapping[str, Any]) -> None:
        self._path, self._index, self._defaults = path, index, defaults

    def of(self, pending: bytearray) -> Iterator[tuple[Line, Request | BadLine]]:
        """The lines whose number is set in `pending`, each as a request or with what is wrong with it."""
        for line in read_lines(self._path):
            if line.number < len(pending) and pending[line.number]:
                try:
                    yield line, self._build(line)
                except BadLine as bad:
                    yield line, bad

    def _build(self, line: Line) -> Request:
        if first := self._index.repeated.get(line.number):
            field = "custom_id" if "custom_id" in line.given else "id"
            raise BadLine(Problem(field, f"{field} {line.id!r} is also that of line {first}: give each its own"))
        return build(line, self._defaults)


def is_batch_api(given: Any) -> bool:
    """Whether a line has the form of OpenAI's Batch API, and is to be answered in it."""
    return isinstance(given, dict) and ("body" in given or "url" in given)


def build(line: Line, defaults: Mapping[str, Any]) -> Request:
    """Complete and check one line.

    Raises:
        BadLine: names the field and what is wrong with it.
    """
    if line.broken:
        raise BadLine(Problem(None, f"the line is not JSON: {line.broken}"))
    if not isinstance(line.given, dict):
        raise BadLine(Problem(None, "the line is not a JSON object"))
    batch_api = is_batch_api(line.given)
    url, fields = _batch_api(line.given) if batch_api else _plain(line.given)
    own = {name: value for name, value in fields.items() if value is not None}
    body = {**defaults, **own}
    if "seed" in body and "seed" not in own:
        body["seed"] += line.number
    request = _checked(url, body)
    if url == COMPLETIONS and not batch_api and not ({"max_tokens", "echo"} & body.keys()):
        # OpenAI's completions stop after 16 tokens unless told. A plain prompt goes on as far as a chat does.
        request.max_tokens = None
    return Request(line, request)


class _BatchApiLine(BaseModel):
    model_config = ConfigDict(extra="forbid")

    custom_id: str = Field(min_length=1)
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: dict[str, Any]


def _batch_api(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    try:
        parsed = _BatchApiLine.model_validate(given)
    except ValidationError as error:
        raise BadLine(explain_validation(error, given)) from None
    return parsed.url, parsed.body


def _plain(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    forms = [name for name in ("messages", "prompt") if name in given]
    if len(forms) != 1:
        found = "both" if forms else "neither"
        raise BadLine(Problem("messages", f"a line has either messages or prompt; this one has {found}"))
    body = {name: value for name, value in given.items() if name not in ("id", "custom_id")}
    return (CHAT if forms == ["messages"] else COMPLETIONS), body


def _checked(url: str, body: dict[str, Any]) -> ChatCompletionRequest | CompletionRequest:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    model = ChatCompletionRequest if url == CHAT else CompletionRequest
    for name in body.keys() - model.model_fields.keys():
        # vLLM would ignore it: a misspelt temperature, say.
        close = difflib.get_close_matches(name, model.model_fields, n=1)
        raise BadLine(Problem(name, f"{name} is not a field of {url}" + (f"; {close[0]} is" if close else "")))
    if body.get("stream"):
        raise BadLine(Problem("stream", "stream: a batch run does not stream; leave it out"))
    try:
        request = model.model_validate(body)
        # Its values, before an engine is there to check them.
        request.to_sampling_params(_token_limit(request), {})
    except ValidationError as error:
        raise BadLine(explain_validation(error, body)) from None
    except Exception as error:  # whatever vLLM's checks raise
        raise BadLine(explain(str(error), getattr(error, "parameter", None), body)) from None
    return request


def _token_limit(request: BaseModel) -> int:
    fields = vars(request)  # read so, pydantic does not warn that max_tokens is deprecated in chats
    limits = (fields.get("max_completion_tokens"), fields["max_tokens"])
    return next((limit for limit in limits if limit is not None), sys.maxsize)


REST: tuple[str, ...] = ("prompt_logprobs", "prompt_token_ids", "usage")


@dataclass(frozen=True)
class Settings:
    """What all answers in one output file have in common, and each record says of itself.

    Attributes:
        model: the checkpoint, as the user named it.
        defaults: the fields that lines are completed with.
    """

    model: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """A line of the output file.

    Attributes:
        number: the input line's.
        text: the record as JSON, with its line feed.
        failed: it holds an error.
        tokens: tokens generated for it.
    """

    number: int
    text: bytes
    failed: bool
    tokens: int = 0


def answered(line: Line, settings: Settings, response: BaseModel) -> Record:
    """Record an OpenAI chat completion or completion."""
    body = response.model_dump(mode="json", exclude_none=True)
    answer: dict[str, Any]
    if is_batch_api(line.given):
        answer = {"response": {"status_code": 200, "request_id": body["id"], "body": body}, "error": None}
    else:
        outputs = [_output(choice) for choice in body["choices"]]
        answer = {"outputs": outputs, **{name: body[name] for name in REST if name in body}, "error": None}
    return _record(line, settings, answer, failed=False, tokens=body["usage"].get("completion_tokens", 0))


def failed(line: Line, settings: Settings, bad: BadLine) -> Record:
    """Record what is wrong with a line."""
    error = {"message": bad.problem.message, "type": bad.kind, "param": bad.problem.field, "code": bad.code}
    return _record(line, settings, {"error": error}, failed=True)


def _output(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice with its text in front, wherever the API has it."""
    message = choice.pop("message", {})
    message.pop("role", None)
    text = choice.pop("text", None) or message.pop("content", "")
    del choice["index"]
    return {"text": text, **choice, **message}


def _record(line: Line, settings: Settings, answer: dict[str, Any], failed: bool, tokens: int = 0) -> Record:
    content: dict[str, Any] = {"line": line.number}
    if is_batch_api(line.given):
        content |= {"id": f"batch_req_{line.number}", "custom_id": line.id}
    elif line.id is not None:
        content["id"] = line.id
    content |= {"input": line.given, **answer, **asdict(settings)}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"
    return Record(line.number, text.encode(), failed, tokens)
