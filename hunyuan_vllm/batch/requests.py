"""The input file of a batch: an index of its lines, and the requests they hold"""

from __future__ import annotations  # array[int]

import difflib
import hashlib
import json
import sys
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hunyuan_vllm.server.middleware.errors import Problem, explain, explain_validation
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.jsonl import Line, read_lines

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class BadLine(Exception):
    """A line that gets an error instead of an answer."""

    def __init__(self, problem: Problem, kind: str = "BadRequestError", code: int = 400) -> None:
        super().__init__(problem.message)
        self.problem, self.kind, self.code = problem, kind, code


@dataclass(frozen=True)
class Request:
    """A line and its request, vLLM's ChatCompletionRequest or CompletionRequest."""

    line: Line
    body: Any


@dataclass(frozen=True)
class Index:
    """What an input file holds, in 8 bytes a line.

    Attributes:
        digests: at [number - 1] the digest of a line; 0 for a blank one.
        repeated: line → the earlier line that has the same id.
    """

    digests: array[int]
    requests: int
    repeated: dict[int, int]


def index_file(path: Path) -> Index:
    """Read the whole file once."""
    digests, ids = array("Q"), array("Q")
    requests = broken = 0
    cause: str | None = None
    for line in read_lines(path):
        blank = [0] * (line.number - 1 - len(digests))
        digests.extend([*blank, digest(line.given)])
        ids.extend([*blank, 0 if line.id is None else digest(str(line.id))])
        requests += 1
        if line.broken:
            broken += 1
            cause = cause or f"line {line.number}: {line.broken}"
    if not requests:
        raise UserError(f"{path} is empty: it needs one request per line")
    if broken == requests:
        raise UserError(f"{path} has no line of JSON; {cause}")
    return Index(digests, requests, _repeated(ids))


def digest(value: Any) -> int:
    """64 bits of a JSON value, never 0; the same after the value is written and read back."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) or 1


def _repeated(ids: array[int]) -> dict[int, int]:
    import numpy

    values = numpy.frombuffer(ids, dtype=numpy.uint64)
    first_at, inverse = numpy.unique(values, return_index=True, return_inverse=True)[1:]
    earlier = first_at[inverse]
    (later,) = numpy.nonzero((earlier != numpy.arange(len(values))) & (values != 0))
    return {int(at) + 1: int(earlier[at]) + 1 for at in later}


def read_requests(
    path: Path, index: Index, defaults: Mapping[str, Any], pending: bytearray
) -> Iterator[tuple[Line, Request | BadLine]]:
    """The lines whose number is set in `pending`, each as a request or with what is wrong with it."""
    for line in read_lines(path):
        if line.number >= len(pending) or not pending[line.number]:
            continue
        if first := index.repeated.get(line.number):
            field = "custom_id" if "custom_id" in line.given else "id"
            yield line, BadLine(Problem(field, f"{field} {line.id!r} is also that of line {first}: ids must be unique"))
            continue
        try:
            yield line, build(line, defaults)
        except BadLine as bad:
            yield line, bad


def is_batch_api(given: Any) -> bool:
    """Whether a line has the form of OpenAI's Batch API; its response then has it too."""
    return isinstance(given, dict) and ("body" in given or "url" in given)


def build(line: Line, defaults: Mapping[str, Any]) -> Request:
    """Check one line, and complete it with the run's defaults; a seed of these is increased by the line's number.

    Raises:
        BadLine: it is not a request.
    """
    if line.broken:
        raise BadLine(Problem(None, f"the line is not JSON: {line.broken}"))
    if not isinstance(line.given, dict):
        raise BadLine(Problem(None, "the line is not a JSON object"))
    batch_api = is_batch_api(line.given)
    url, fields = _batch_api(line.given) if batch_api else _plain(line.given)
    own = {name: value for name, value in fields.items() if value is not None}
    body = {**defaults, **own}
    if "seed" not in own and isinstance(body.get("seed"), int):
        body["seed"] += line.number
    request = _checked(url, body)
    if url == COMPLETIONS and not batch_api and not ({"max_tokens", "echo"} & body.keys()):
        # OpenAI's completions stop after 16 tokens by default; a plain prompt has a chat's limit.
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


def _checked(url: str, body: dict[str, Any]) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    model = ChatCompletionRequest if url == CHAT else CompletionRequest
    for name in body.keys() - model.model_fields.keys():  # vLLM would ignore it, e.g. a misspelt temperature
        close = difflib.get_close_matches(name, model.model_fields, n=1)
        raise BadLine(Problem(name, f"{name} is not a field of {url}" + (f"; {close[0]} is" if close else "")))
    if body.get("stream"):
        raise BadLine(Problem("stream", "stream: a batch run does not stream; leave it out"))
    try:
        request = model.model_validate(body)
        fields = vars(request)  # attribute access would warn that max_tokens is deprecated in chats
        limits = (fields.get("max_completion_tokens"), fields["max_tokens"])
        limit = next((limit for limit in limits if limit is not None), sys.maxsize)
        request.to_sampling_params(limit, {})  # checks the values, before the engine is there
    except ValidationError as error:
        raise BadLine(explain_validation(error, body)) from None
    except Exception as error:  # whatever vLLM's checks raise
        raise BadLine(explain(str(error), getattr(error, "parameter", None), body)) from None
    return request
