"""Training data: one conversation a line of JSONL, in several forms, checked"""

import re
from collections.abc import Callable
from typing import Any, Final, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from hunyuan_vllm.network import Network
from hunyuan_vllm.util.jsonl import JSON_ARRAY, Line

MESSAGES: Final = "messages"

# Names of the roles in ShareGPT and its variants.
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


class BadForm(ValueError):
    """A line of no known form, or of two; the message says which fields it has."""


def form_of(given: dict[str, Any]) -> str:
    """The name of the form that a line's fields have."""
    if MESSAGES in given:
        return MESSAGES  # some data sets also have the first question as "prompt"
    fitting = [name for name, (fields, _) in FORMS.items() if fields <= given.keys()]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise BadForm(f"it fits two forms, {' and '.join(fitting)}: leave the fields of one out")
    names = ", ".join(sorted(map(str, given))[:5]) or "no field"
    raise BadForm(f'it has no "messages", nor the fields of another known form; it has {names}')


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


FORMS: Final[dict[str, tuple[set[str], Callable[[dict[str, Any]], list[Any]]]]] = {  # name: fields, conversion
    "sharegpt": ({"conversations"}, _sharegpt),
    "alpaca": ({"instruction", "output"}, _alpaca),
    "prompt-completion": ({"prompt", "completion"}, _prompt_completion),
}


DEFAULT_SYSTEM: Final = "You are a helpful assistant."
"""The system message of conversations without one, as in the published examples."""


def published_system(network: Network | None) -> str:
    """What a conversation without a system message gets in the published training: Hunyuan-Large's adds one, that of
    the V1 models nothing."""
    return "" if network is not None and network.is_v1 else DEFAULT_SYSTEM


Role: TypeAlias = Literal["system", "user", "assistant"]

FORM = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
# Special tokens of the chat formats: inside a text they would end a turn or a document.
MARK = re.compile(
    r"<\|(?:endoftext|startoftext|bos|eos|pad|extra_[045])\|>"
    r"|<｜hy_(?:begin▁of▁sentence|User|Assistant|place▁holder▁no▁\d+)｜>"
)
EMPTY: tuple[Any, ...] = (None, "", [], {})


class BadConversation(ValueError):
    """A line that cannot be trained on; the message is its cause."""


class Message(BaseModel):
    """One turn. `content` may be a list of text parts, which are joined as a server does. Empty fields are allowed.

    Attributes:
        name: not used, since the chat format has none.
        weight: 0 for an answer that is not learned.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Role
    content: str
    name: str | None = None
    weight: Literal[0, 1] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if name in cls.model_fields or value not in EMPTY}

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, given: Any) -> Any:
        if not isinstance(given, list):
            return given
        texts = []
        for part in given:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError('a part is not {"type": "text", "text": "..."}: the model reads text only')
            texts.append(part["text"])
        return "\n".join(filter(None, texts))

    @field_validator("content")
    @classmethod
    def _without_marks(cls, text: str) -> str:
        if found := MARK.search(text):
            raise ValueError(f"it contains {found[0]}, which is a special token: remove it")
        return text


class Conversation(BaseModel):
    """A line: an optional system message, then user and assistant in turn, the assistant last.

    Fields beside `messages` (an id, a source) are allowed and not used.
    """

    model_config = ConfigDict(frozen=True)

    messages: list[Message]

    @model_validator(mode="after")
    def _in_turn(self) -> Self:
        turns = self.messages[1:] if self.messages and self.messages[0].role == "system" else self.messages
        skipped = len(self.messages) - len(turns)
        for place, turn in enumerate(turns):
            number, wanted = place + skipped + 1, ("user", "assistant")[place % 2]
            if turn.role == "system":
                raise ValueError(f"message {number} is a system message, which must be the only one and the first")
            if turn.role != wanted:
                raise ValueError(f"message {number} is of the {turn.role}, and it is the {wanted}'s turn")
            if not turn.content.strip():
                raise ValueError(f"message {number} ({turn.role}) is empty")
        if not turns:
            raise ValueError("it has no user and assistant messages")
        if turns[-1].role != "assistant":
            raise ValueError("it ends with the user's message: the last message must be the assistant's")
        if all(turn.weight == 0 for turn in turns if turn.role == "assistant"):
            raise ValueError("each answer has weight 0, so nothing is learned")
        return self

    def as_dicts(self, default_system: str = DEFAULT_SYSTEM) -> list[dict[str, str]]:
        """The messages as a chat template takes them, with `default_system` in front if there is no system message.

        A system message that is empty stays: it says that there is none.
        """
        messages = [{"role": message.role, "content": message.content} for message in self.messages]
        if default_system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": default_system})
        return messages


def parse_conversation(line: Line) -> Conversation:
    """The conversation that a line of JSONL holds.

    Raises:
        BadConversation: it holds none; the message says what is wrong, without the line's number.
    """
    if line.broken is not None:
        raise BadConversation(f"it is not JSON: {line.broken}")
    if not isinstance(line.given, dict):
        hint = JSON_ARRAY if line.number == 1 and isinstance(line.given, list) else ""
        raise BadConversation(f"it is not a JSON object: a line is {FORM}{hint}")
    try:
        form = form_of(line.given)
        messages = line.given[MESSAGES] if form == MESSAGES else FORMS[form][1](line.given)
        return Conversation.model_validate({MESSAGES: messages})
    except BadForm as error:
        raise BadConversation(f"{error}: a line is {FORM}") from None
    except ValidationError as error:
        raise BadConversation(_cause(error)) from None


def _cause(error: ValidationError) -> str:
    """The first mistake: "role of message 3: …"."""
    first = error.errors(include_url=False)[0]
    match first["loc"]:
        case ("messages", int(index), field, *_):
            place = f"{field} of message {index + 1}: "
        case ("messages", int(index)):
            place = f"message {index + 1}: "
        case path:
            place = "".join(f"{name}: " for name in path)
    return place + (str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"])
