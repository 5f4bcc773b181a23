"""Texts and questions that an evaluation scores"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_vllm.evaluation.tasks import TASKS_DIRECTORY
from hunyuan_vllm.quantize.texts import read_documents
from hunyuan_vllm.train.tokens import IGNORED, encode_chat
from hunyuan_vllm.util.errors import UserError

BUILT_IN_TEXT = Path(__file__).with_name("bilingual.txt")


@dataclass(frozen=True)
class Passage:
    """Tokens that the engine reads at once.

    Attributes:
        scored: indices into `ids`, each at least 1, of the tokens whose prediction counts.
    """

    ids: list[int]
    scored: list[int]


def read_passages(file: Path, tokenizer: Any, context: int) -> list[Passage]:
    """The passages of a file: of a *.jsonl file one a line, of any other the text in windows of `context` tokens.

    A line of JSONL is {"messages": [...]}, of which what the assistant says counts, or {"text": "..."}, which is cut
    into windows as a text file is.
    """
    passages: list[Passage] = []
    for number, document in enumerate(read_documents(file, option="--text"), start=1):
        if isinstance(document, str):
            passages += text_passages(document, tokenizer, context)
            continue
        try:
            passages.append(chat_passage(document, tokenizer, context))
        except ValueError as error:
            raise UserError(f"chat {number} of --text {file}: {error}") from None
    if not any(passage.scored for passage in passages):
        raise UserError(f"--text {file} has no token to score within a context of {context}: raise --context")
    return [passage for passage in passages if passage.scored]


def text_passages(text: str, tokenizer: Any, context: int) -> list[Passage]:
    """`text` in windows that each begin with the document's start token; every other token counts."""
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    step = context - len(head)
    windows = [head + ids[start : start + step] for start in range(0, len(ids), step)]
    return [Passage(window, list(range(1, len(window)))) for window in windows if len(window) > 1]


def chat_passage(messages: Sequence[Mapping[str, str]], tokenizer: Any, context: int) -> Passage:
    """A conversation in the model's own format; the assistant's tokens count, each turn's end included.

    What lies beyond `context` tokens is cut off.

    Raises:
        ValueError: the chat template cannot render the messages, or no assistant speaks in them.
    """
    example = encode_chat(messages, tokenizer)
    scored = [index for index, label in enumerate(example.labels) if label != IGNORED]
    if not scored:
        raise ValueError("no message has the role 'assistant', and only those are scored")
    return Passage(example.input_ids[:context], [index for index in scored if index < context])


def limited(passages: Sequence[Passage], tokens: int | None) -> list[Passage]:
    """The first passages, as far as `tokens` scored tokens go."""
    kept: list[Passage] = []
    for passage in passages:
        part = passage.scored if tokens is None else passage.scored[:tokens]
        if part:
            kept.append(Passage(passage.ids[: part[-1] + 1], part))
        if tokens is not None:
            tokens -= len(part)
    return kept


MAX_ANSWER = 96  # tokens; the longest right answer has about 60


@dataclass(frozen=True)
class Question:
    """A question with its setting and the right answer; `group` names the kind of problem."""

    group: str
    language: str
    system: str | None
    question: str
    answer: str

    def passage(self, tokenizer: Any) -> Passage:
        """Question and right answer; the answer's tokens count."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]
        return chat_passage(system + turns, tokenizer, 2**30)


def held_out_questions() -> list[Question]:
    lines = (TASKS_DIRECTORY / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [Question(**{name: row[name] for name in Question.__dataclass_fields__}) for row in rows]
