"""What is wrong with a request, in one line that names the field.

vLLM finds the mistakes; its words for them are at times a dump of every type that was tried, or leave the field out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

__all__ = [
    "Problem",
    "constraint",
    "explain",
    "explain_adapter",
    "explain_crash",
    "explain_dead_end",
    "explain_unread",
    "explain_validation",
]

SHOWN = 60  # characters of a wrong value
ENGINE_ERROR = "Internal server error"  # vLLM's GenerationError
# What makes a conversation of what the client sent: all of a module, and one function of another.
MESSAGES_READER = "vllm.renderers.chat_utils"
INPUT_READER = ("vllm.entrypoints.openai.responses.utils", "construct_input_messages")
LOAD_ADAPTER = "/v1/load_lora_adapter"
# What vLLM's engine, and around it its executor, make of an error while an adapter is loaded.
ADAPTER_REFUSED = re.compile(
    r"Call to add_lora method failed: (Worker failed with error ['\"])?(?P<reason>.*?)(['\"], please check the|$)",
    re.DOTALL,
)
CONSTRAINTS = ("structured_outputs", "response_format", "tools", "text")
SHOULD_BE = "Input should be "
PYTHON_TYPE = re.compile(r"dictionary( or (instance of \w+|object to extract fields from))?")
VLLM_SUFFIX = re.compile(r" \(parameter=.*\)$", re.DOTALL)
# Mistakes that vLLM reports without a field, or under a name that is no field, and the field each is about.
UNNAMED = (
    (re.compile("maximum context length|this server takes at most"), ("messages", "prompt")),
    (re.compile("chat template|multimodal|Unknown role|text only"), ("messages",)),
    (re.compile("out of vocabulary|at least one prompt"), ("prompt",)),
    (re.compile("sample logprobs"), ("top_logprobs", "logprobs")),
    (re.compile("[Gg]rammar|schema|regex"), ("structured_outputs", "response_format")),
    (re.compile("structural tag"), ("structured_outputs", "response_format", "tools")),
    (re.compile("tool choice"), ("tool_choice", "tools")),
)


@dataclass(frozen=True)
class Problem:
    """A mistake in a request.

    Attributes:
        field: where it is, as in "temperature" or "messages.0.role"; None if it is in no field.
        message: one line, which names the field.
    """

    field: str | None
    message: str


def explain(message: str, field: str | None, body: Mapping[str, Any]) -> Problem:
    """vLLM's `message` about the request `body`, cleaned, and the field it is about if `field` does not say."""
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
    """The mistake behind a pydantic error about the request `body`."""
    problem = _furthest(error, body)
    if problem.field and problem.field.split(".")[0] == "messages":
        return _messages_problem(body) or problem
    return problem


def explain_crash(model: type[BaseModel], body: Mapping[str, Any]) -> Problem | None:
    """The field on which `model`'s own checks of `body` break down, as those of vLLM do on types they do not foresee.

    None if they do not: what failed is then not the request.
    """
    if not _crashes(model, body):
        return None
    fields = sorted(body, key=lambda name: name in model.model_fields and model.model_fields[name].is_required())
    for field in fields:
        if not _crashes(model, {name: value for name, value in body.items() if name != field}):
            return Problem(field, f"{field} should not be {_shown(body[field])}")
    return Problem(None, "the request's fields are not of the types that they should be")


def constraint(body: Mapping[str, Any]) -> str | None:
    """The field that says which tokens may follow, if there is one."""
    return next((name for name in CONSTRAINTS if body.get(name)), None)


def explain_dead_end(message: str, field: str | None) -> Problem | None:
    """That the constraint in `field` left the engine without a token, where that may be behind its failure; else None.

    vLLM ends such a request as it ends one that the engine itself failed on, without a word of the grammar.
    """
    if message != ENGINE_ERROR or field is None:
        return None
    return Problem(
        field, f"{field} took too long to compile, or with what else the request allows leaves no token to go on with"
    )


def explain_adapter(path: str, message: str) -> Problem | None:
    """That an adapter cannot be loaded, where that is what a running engine answered; else None."""
    if path != LOAD_ADAPTER or not (match := ADAPTER_REFUSED.search(message)):
        return None
    return Problem("lora_path", f"lora_path: {match['reason']}")


def explain_unread(error: Exception, body: Mapping[str, Any]) -> Problem | None:
    """That the messages are of no form that vLLM knows, if it is in reading them that it failed; else None."""
    passed = {(frame.f_globals.get("__name__"), frame.f_code.co_name) for frame, _ in walk_tb(error.__traceback__)}
    if INPUT_READER not in passed and MESSAGES_READER not in {module for module, _ in passed}:
        return None
    field = next((name for name in ("messages", "input") if name in body), None)
    return Problem(field, f"{field or 'the request'} has content of a kind or a form that cannot be read")


def _crashes(model: type[BaseModel], body: Mapping[str, Any]) -> bool:
    try:
        model.model_validate(body)
    except ValidationError:
        return False
    except Exception:
        return True
    return False


def _furthest(error: ValidationError, body: Mapping[str, Any]) -> Problem:
    """Of all the types that were tried, what those say that got furthest into the request."""
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
    """The steps of a pydantic location that are in the request, without the types tried on the way."""
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
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


class _TextPart(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[_TextPart] | None = None


class _Conversation(BaseModel):
    messages: list[_Message] = Field(min_length=1)


def _messages_problem(body: Mapping[str, Any]) -> Problem | None:
    """What is wrong with the messages, judged by what the model's own chat template takes."""
    try:
        _Conversation.model_validate(body)
    except ValidationError as error:
        return _furthest(error, body)
    return None
