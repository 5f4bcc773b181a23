"""The forms in which a line of training data may hold a conversation, each turned into `messages`.

Which form a line has is decided by its fields alone, line by line; one that fits two forms is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

__all__ = ["MESSAGES", "BadForm", "form_of", "to_messages"]

MESSAGES: Final = "messages"

# ShareGPT's names of the speakers, and those that its descendants use.
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


class BadForm(ValueError):
    """A line of no known form, or of two; the message says which fields it has."""


def form_of(given: dict[str, Any]) -> str:
    """The name of the form that a line's fields have.

    Raises:
        BadForm: it has none, or two of them.
    """
    if MESSAGES in given:
        return MESSAGES  # whatever lies beside: data sets keep the first question as "prompt", too
    fitting = [name for name, form in FORMS.items() if form.fields <= given.keys()]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise BadForm(f"it fits two forms, {' and '.join(fitting)}: leave the fields of one out")
    raise BadForm(f'it has no "messages", nor the fields of another known form; it has {_names(given)}')


def to_messages(given: dict[str, Any]) -> Any:
    """The messages of a line, not checked yet.

    Raises:
        BadForm: as `form_of`, or its fields do not hold what the form has there.
    """
    name = form_of(given)
    return given[MESSAGES] if name == MESSAGES else FORMS[name].convert(given)


def _sharegpt(given: dict[str, Any]) -> list[Any]:
    """{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}], "system": …}"""
    turns = given["conversations"]
    if not isinstance(turns, list):
        raise BadForm("conversations is not a list")
    return [*_system(given), *map(_sharegpt_turn, turns)]


def _sharegpt_turn(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    message = dict(turn)
    if "from" in message:
        speaker = message.pop("from")
        message["role"] = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if "value" in message:
        message["content"] = message.pop("value")
    return message


def _alpaca(given: dict[str, Any]) -> list[Any]:
    """{"instruction": …, "input": …, "output": …, "system": …, "history": [[question, answer], …]}"""
    history = given.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadForm("history is not a list of [question, answer]")
    question = given["instruction"]
    if more := given.get("input"):
        if not isinstance(question, str) or not isinstance(more, str):
            raise BadForm("instruction and input are not texts")
        question = f"{question}\n{more}" if question else more
    turns = [*history, [question, given["output"]]]
    return [*_system(given), *(message for asked, said in turns for message in (_user(asked), _assistant(said)))]


def _prompt_completion(given: dict[str, Any]) -> list[Any]:
    """{"prompt": …, "completion": …}, each a text or a list of messages."""
    prompt, completion = given["prompt"], given["completion"]
    before = prompt if isinstance(prompt, list) else [_user(prompt)]
    return [*_system(given), *before, *(completion if isinstance(completion, list) else [_assistant(completion)])]


def _system(given: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": given["system"]}] if given.get("system") else []


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _names(given: dict[str, Any]) -> str:
    return ", ".join(sorted(map(str, given))[:5]) or "no field"


class _Form(NamedTuple):
    fields: set[str]
    convert: Callable[[dict[str, Any]], list[Any]]


FORMS: Final = {
    "sharegpt": _Form({"conversations"}, _sharegpt),
    "alpaca": _Form({"instruction", "output"}, _alpaca),
    "prompt-completion": _Form({"prompt", "completion"}, _prompt_completion),
}
