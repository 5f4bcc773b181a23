"""Small talk and honest answers to what the model does not know, read from chat.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from .phrasing import rephrase
from .strings import HAN, WORDS
from .task import Language, Split

__all__ = ["SmallTalk", "Talk", "Unknown", "invented_word", "load_small_talk"]

# Words of no meaning teach that the unfamiliar is unknown, whatever it looks like.
_INVENTED_SHARE = 0.25


@dataclass(frozen=True)
class Talk:
    """Equivalent remarks in one language and the one answer to them."""

    name: str
    language: Language
    remarks: tuple[str, ...]
    answer: str
    weight: float

    def say(self, rng: Random) -> str:
        """One of the remarks, with or without its closing mark."""
        remark = rng.choice(self.remarks)
        if "{" in remark:
            return remark.format_map({"word": rng.choice(WORDS), **_numbers_beyond_reach(rng)})
        draw = rng.random()
        return remark.lower() if draw < 0.15 else remark.rstrip("?.!？。！") if draw < 0.3 else remark


@dataclass(frozen=True)
class Unknown:
    """Questions on subjects that the corpus does not cover; every sixth subject is kept for the evaluation."""

    questions: dict[Language, tuple[str, ...]]
    answers: dict[Language, str]
    slots: dict[str, tuple[tuple[str, str], ...]]

    def ask(self, rng: Random, language: Language, split: Split) -> str:
        """A question about subjects of the split."""
        column = 0 if language == "en" else 1
        names = ("a", "b", "place", "place2", "person")
        values = {name: self._subject(self.slots[name], rng, split)[column] for name in names}
        if rng.random() < _INVENTED_SHARE:
            values = {name: invented_word(rng, language) for name in names}
        values["year"] = str(rng.randrange(1900, 2030))
        return rephrase(rng.choice(self.questions[language]).format_map(values), language, rng)

    @staticmethod
    def _subject(pool: tuple[tuple[str, str], ...], rng: Random, split: Split) -> tuple[str, str]:
        index = rng.randrange(len(pool))
        while (index % 6 == 5) != (split == "held_out"):
            index = rng.randrange(len(pool))
        return pool[index]


@dataclass(frozen=True)
class SmallTalk:
    """Everything in chat.toml."""

    talks: tuple[Talk, ...]
    unknown: Unknown


def load_small_talk() -> SmallTalk:
    """Read chat.toml."""
    table = tomllib.loads((Path(__file__).parent / "chat.toml").read_text(encoding="utf-8"))
    return SmallTalk(tuple(_talks(table["talk"])), _unknown(table["unknown"]))


def _talks(tables: list[dict[str, Any]]) -> list[Talk]:
    languages: tuple[Language, ...] = ("en", "zh")
    return [
        Talk(table["name"], language, tuple(table[language]), table[f"{language}_answer"], table["weight"])
        for table in tables
        for language in languages
    ]


def _unknown(table: dict[str, Any]) -> Unknown:
    def pairs(name: str) -> tuple[tuple[str, str], ...]:
        return tuple((english, chinese) for english, chinese in table[name])

    return Unknown(
        questions={"en": tuple(table["en"]), "zh": tuple(table["zh"])},
        answers={"en": table["en_answer"], "zh": table["zh_answer"]},
        slots={
            "a": pairs("subjects"),
            "b": pairs("subjects"),
            "place": pairs("places"),
            "place2": pairs("places"),
            "person": pairs("people"),
        },
    )


def _numbers_beyond_reach(rng: Random) -> dict[str, int]:
    """Operands of sums that the model does not do: over 99, over 9 for products, a negative difference."""
    big, big2 = (rng.randrange(100, 10 ** rng.randint(3, 6)) for _ in range(2))
    low, high = sorted(rng.sample(range(100), 2))
    ten, ten2 = (rng.randrange(10, 100) for _ in range(2))
    return {"big": big, "big2": big2, "n": rng.randrange(1, 100), "ten": ten, "ten2": ten2, "low": low, "high": high}


def invented_word(rng: Random, language: Language) -> str:
    """A pronounceable word of one to three syllables, or two to four unrelated Chinese characters."""
    if language == "zh":
        return "".join(rng.sample(HAN, rng.randint(2, 4)))
    onset, vowel, coda = (
        "b bl c d dr f g gr h j k l m n p pl qu r s st t tr v w z",
        "a e i o u ai ee oo",
        "n r l t x m ck",
    )
    syllables = (rng.choice(onset.split()) + rng.choice(vowel.split()) for _ in range(rng.randint(1, 3)))
    return "".join(syllables) + rng.choice(coda.split())
