"""A conversation as token ids, as a server gives it to the model, and which of them are learned"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from hunyuan_vllm.train.messages import DEFAULT_SYSTEM, BadConversation, Conversation

IGNORED: Final = -100
"""The label of a token that is not learned."""


@dataclass(frozen=True)
class Example:
    """One conversation.

    Attributes:
        labels: as long as `input_ids` and not shifted: the token itself where it is learned, else `IGNORED`.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def learned(self) -> int:
        """Number of tokens whose prediction has a label."""
        return sum(label != IGNORED for label in self.labels[1:])

    def cut(self, length: int) -> Self:
        if len(self) <= length:
            return self
        return replace(self, input_ids=self.input_ids[:length], labels=self.labels[:length], truncated=True)


def encode(
    conversation: Conversation, tokenizer: Any, *, train_on_all: bool = False, default_system: str = DEFAULT_SYSTEM
) -> Example:
    """Token ids by the checkpoint's chat template; the assistant's messages with their end token are learned, unless
    their weight is 0.

    Args:
        default_system: put in front of a conversation without a system message; "" for none.
    """
    messages = conversation.as_dicts(default_system)
    added = len(messages) - len(conversation.messages)
    weights = [*[None] * added, *(message.weight for message in conversation.messages)]
    pieces = _pieces(messages, weights, tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in pieces:
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        labels += part if learned or train_on_all else [IGNORED] * len(part)
    if not _cut_cleanly([text for text, _ in pieces], tokenizer):
        _compare(ids, tokenizer("".join(text for text, _ in pieces), add_special_tokens=False)["input_ids"])
    return Example(ids, labels)


def _pieces(messages: list[dict[str, str]], weights: Sequence[int | None], tokenizer: Any) -> list[tuple[str, bool]]:
    """The rendered text, split before and after each answer: (text, whether it is learned)."""
    pieces: list[tuple[str, bool]] = []
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _render(tokenizer, messages[:turn], add_generation_prompt=True)
        answered = _render(tokenizer, messages[: turn + 1], add_generation_prompt=False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise BadConversation(
                f"the chat template renders earlier turns differently once message {turn + 1} is there: "
                "training needs a template that appends each turn to the previous ones"
            )
        pieces += [(asked[len(done) :], False), (answered[len(asked) :], weights[turn] != 0)]
        done = answered
    return pieces


def _render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # whatever a template's own code raises
        raise BadConversation(f"the chat template refuses it: {error}") from None


def _cut_cleanly(texts: list[str], tokenizer: Any) -> bool:
    """Whether the pieces tokenize like the whole text: there is a special token at each cut, and the characters on both
    sides do not compose."""
    marks = tuple(tokenizer.all_special_tokens)
    for before, behind in zip(texts, texts[1:], strict=False):
        if not (before.endswith(marks) or behind.startswith(marks)):
            return False
        seam = before[-1:] + behind[:1]
        if unicodedata.normalize("NFC", seam) != seam or unicodedata.combining(seam[-1]):
            return False
    return True


def _compare(ids: list[int], served: list[int]) -> None:
    if ids != served:
        raise BadConversation(
            "at the start or the end of an answer the tokenizer joins characters of two turns: "
            "does a message begin with a combining mark?"
        )
