"""What a checkable task is: problems drawn at random, bilingual wordings, one right answer, and a held-out split.

A problem is held out by a hash of its operands, never of its wording, so an evaluated problem occurs in no training
text, in any phrasing or language.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Literal

__all__ = ["HELD_OUT_SHARE", "Language", "Problem", "Question", "Split", "Task", "Wording", "is_held_out"]

Language = Literal["en", "zh"]
Split = Literal["train", "held_out"]

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Problem:
    """One problem: `key` identifies its operands, whatever the wording; `slots` fill the templates."""

    key: str
    slots: Mapping[str, str]
    variant: str = ""


@dataclass(frozen=True)
class Wording:
    """Equivalent question templates and the one template of the answer, in one language."""

    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Question:
    """A problem put into words."""

    task: str
    language: Language
    key: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A family of problems; tasks.toml words them."""

    name: str
    draw: Callable[[Random], Problem]

    def question(self, rng: Random, split: Split, language: Language) -> Question:
        """Draw a problem of the split and word it at random."""
        problem = self.draw(rng)
        while is_held_out(self.name, problem.key) != (split == "held_out"):
            problem = self.draw(rng)
        return self.word(problem, rng, language)

    def word(self, problem: Problem, rng: Random, language: Language) -> Question:
        """Put a problem into one of the language's wordings."""
        wording = _wordings()[self.name, problem.variant, language]
        prompt = rng.choice(wording.questions).format_map(problem.slots)
        return Question(self.name, language, problem.key, prompt, wording.answer.format_map(problem.slots))


@cache
def _wordings() -> dict[tuple[str, str, Language], Wording]:
    """Wordings by task, variant and language."""
    tables = tomllib.loads((Path(__file__).parent / "tasks.toml").read_text(encoding="utf-8"))["wording"]
    languages: tuple[Language, ...] = ("en", "zh")
    return {
        (table["task"], table.get("variant", ""), language): Wording(
            tuple(table[language]), table[f"{language}_answer"]
        )
        for table in tables
        for language in languages
    }


def is_held_out(task: str, key: str) -> bool:
    """Whether the problem belongs to the held-out split: a fixed pseudo-random tenth of all keys."""
    digest = hashlib.sha256(f"{task}\0{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32
