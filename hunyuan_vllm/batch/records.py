"""The lines of the output file: what was asked, and the answer or the error, in one JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import BaseModel

from hunyuan_vllm.batch.lines import Line
from hunyuan_vllm.batch.requests import BadLine, is_batch_api

__all__ = ["Record", "Settings", "answered", "failed"]

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
