"""A conversation as token ids, as a server gives it to the model, and which of them are learned"""

from collections.abc import Collection, Mapping, Sequence
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
    ignored = {turn + added for turn, message in enumerate(conversation.messages) if message.weight == 0}
    example = encode_chat(messages, tokenizer, ignored)
    return replace(example, labels=example.input_ids) if train_on_all else example


def encode_chat(
    messages: Sequence[Mapping[str, str]], tokenizer: Any, ignored: Collection[int] = frozenset()
) -> Example:
    """Token ids of a chat as a server gives it to the model; the answers are learned but for those of turns in
    `ignored`.

    Raises:
        BadConversation: the chat template refuses the messages, or rewrites earlier turns.
    """
    text = ""
    learned = bytearray()  # by character
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _render(tokenizer, messages[:turn], add_generation_prompt=True)
        answered = _render(tokenizer, messages[: turn + 1], add_generation_prompt=False)
        if not (asked.startswith(text) and answered.startswith(asked)):
            raise BadConversation(
                f"the chat template renders earlier turns differently once message {turn + 1} is there: "
                "training needs a template that appends each turn to the previous ones"
            )
        learned = learned.ljust(len(asked), b"\0").ljust(len(answered), b"\0" if turn in ignored else b"\1")
        text = answered
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = tokens["input_ids"]
    labels = [id if learned[start] else IGNORED for id, (start, _) in zip(ids, tokens["offset_mapping"], strict=True)]
    return Example(ids, labels)


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # whatever a template's own code raises
        raise BadConversation(f"the chat template refuses it: {error}") from None
