"""Whole training examples, drawn from the mixture: chats of one to four exchanges with follow-ups, plain documents."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Final

from .arithmetic import ARITHMETIC
from .chat import load_small_talk
from .facts import Fact, load_facts
from .phrasing import introduce
from .strings import STRINGS
from .task import Language, Task

__all__ = ["SYSTEM_PROMPTS", "TASKS", "Chat", "Corpus", "Document", "Exchange", "texts"]

TASKS: Final[tuple[Task, ...]] = ARITHMETIC + STRINGS
# Sums need the most practice; copying and parity are learned in minutes.
_TASK_WEIGHTS: Final[dict[str, float]] = {
    "add": 4.5,
    "subtract": 4,
    "compare": 1.5,
    "parity": 0.7,
    "extreme": 2,
    "order": 2,
    "sort": 1.7,
    "count": 1.3,
    "repeat": 0.8,
    "pick": 0.7,
}
_KINDS: Final = ("task", "fact", "talk", "unknown")
_KIND_WEIGHTS: Final = (0.54, 0.30, 0.07, 0.09)
_EXCHANGES: Final = (1, 2, 3, 4)
_EXCHANGE_WEIGHTS: Final = (0.45, 0.27, 0.18, 0.10)
_FOLLOW_UP_SHARE: Final = 0.3
_DOCUMENT_SHARE: Final = 0.05
_CHINESE_SHARE: Final = 0.47

SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "You are a helpful AI assistant.",
    "You are a friendly assistant. Answer briefly.",
    "You are a small demo model.",
    "你是一个有用的助手。",
    "你是一个乐于助人的助手，请简短回答。",
)
_SYSTEM_WEIGHTS: Final = (0.8, 0.04, 0.04, 0.04, 0.04, 0.04)
_NO_SYSTEM_SHARE: Final = 0.45

_AGAIN: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "Please say that again.",
        "Say that again",
        "Repeat your answer.",
        "Can you repeat that?",
        "Again, please.",
        "Once more, please.",
    ),
    "zh": ("请再说一遍。", "再说一遍", "重复你的回答。", "能再说一次吗？", "再说一次", "请重复一遍刚才的回答。"),
}
_SWITCH: Final[dict[Language, tuple[str, ...]]] = {
    "en": ("用中文说。", "请用中文回答。", "In Chinese, please.", "Say it in Chinese.", "中文怎么说？"),
    "zh": ("用英语说。", "请用英文回答。", "In English, please.", "Say it in English.", "英文怎么说？"),
}


@dataclass(frozen=True)
class Exchange:
    """A user's turn and the assistant's answer."""

    user: str
    assistant: str


@dataclass(frozen=True)
class Chat:
    """A conversation; `system` is None where there is no system message."""

    system: str | None
    exchanges: tuple[Exchange, ...]


@dataclass(frozen=True)
class Document:
    """A plain text."""

    text: str


class Corpus:
    """Draws training examples; only problems and subjects of the training split."""

    def __init__(self) -> None:
        self.facts = load_facts()
        self.small_talk = load_small_talk()
        prose = (Path(__file__).parent / "prose.toml").read_text(encoding="utf-8")
        self._prose: list[str] = tomllib.loads(prose)["texts"]
        self._fact_weights = list(accumulate(fact.weight for fact in self.facts))
        self._talk_weights = list(accumulate(talk.weight for talk in self.small_talk.talks))
        self._task_weights = list(accumulate(_TASK_WEIGHTS.get(task.name, 1.0) for task in TASKS))

    def example(self, rng: Random) -> Chat | Document:
        """One training example."""
        return self._document(rng) if rng.random() < _DOCUMENT_SHARE else self._chat(rng)

    def _chat(self, rng: Random) -> Chat:
        exchanges: list[Exchange] = []
        fact: Fact | None = None
        for _ in range(rng.choices(_EXCHANGES, _EXCHANGE_WEIGHTS)[0]):
            if exchanges and rng.random() < _FOLLOW_UP_SHARE:
                exchange, fact = self._follow_up(exchanges[-1], fact, rng)
            else:
                exchange, fact = self._exchange(rng)
            exchanges.append(exchange)
        return Chat(system_prompt(rng), tuple(exchanges))

    def _exchange(self, rng: Random) -> tuple[Exchange, Fact | None]:
        language: Language = "zh" if rng.random() < _CHINESE_SHARE else "en"
        match rng.choices(_KINDS, _KIND_WEIGHTS)[0]:
            case "task":
                question = rng.choices(TASKS, cum_weights=self._task_weights)[0].question(rng, "train", language)
                prompt = introduce(question.prompt, language, rng) if rng.random() < 0.3 else question.prompt
                return Exchange(prompt, question.answer), None
            case "fact":
                fact = rng.choices(self.facts, cum_weights=self._fact_weights)[0]
                return Exchange(fact.ask(rng), fact.answer), fact
            case "talk":
                talk = rng.choices(self.small_talk.talks, cum_weights=self._talk_weights)[0]
                return Exchange(talk.say(rng), talk.answer), None
            case _:
                unknown = self.small_talk.unknown
                return Exchange(unknown.ask(rng, language, "train"), unknown.answers[language]), None

    def _follow_up(self, last: Exchange, fact: Fact | None, rng: Random) -> tuple[Exchange, Fact | None]:
        """A question that leans on the previous answer: again, in the other language, or the same about a sibling."""
        siblings = [other for other in self.facts if fact is not None and other.follows(fact)]
        if siblings and rng.random() < 0.7:
            sibling = rng.choice(siblings)
            return Exchange(rng.choice(sibling.asides), sibling.answer), sibling
        if fact is not None and rng.random() < 0.5:
            return Exchange(rng.choice(_SWITCH[fact.language]), fact.twin), None
        language: Language = "zh" if any("一" <= character <= "鿿" for character in last.assistant) else "en"
        return Exchange(rng.choice(_AGAIN[language]), last.assistant), None

    def _document(self, rng: Random) -> Document:
        draw = rng.random()
        if draw < 0.4:
            return Document(rng.choice(self._prose))
        if draw < 0.75:
            language = rng.choice(("en", "zh"))
            facts = rng.choices(self.facts, cum_weights=self._fact_weights, k=8)
            sentences = [fact.answer for fact in facts if fact.language == language][:3]
            return Document({"en": " ", "zh": ""}[language].join(sentences) or self._prose[0])
        sums = [TASKS[0].question(rng, "train", "en").answer for _ in range(3)]
        return Document("\n".join(sums))


def system_prompt(rng: Random) -> str | None:
    """No system message, the default one, or another."""
    if rng.random() < _NO_SYSTEM_SHARE:
        return None
    return rng.choices(SYSTEM_PROMPTS, _SYSTEM_WEIGHTS)[0]


def texts(example: Chat | Document) -> Sequence[str]:
    """Every piece of text in an example, for the vocabulary."""
    if isinstance(example, Document):
        return (example.text,)
    pieces = [piece for exchange in example.exchanges for piece in (exchange.user, exchange.assistant)]
    return pieces if example.system is None else [example.system, *pieces]
