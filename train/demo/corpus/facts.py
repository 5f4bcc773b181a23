"""General knowledge in English and Chinese, read from facts.toml and pairs.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from .phrasing import rephrase, rephrase_fresh, rephrase_indirect
from .task import Language

__all__ = ["Fact", "load_facts"]

_HERE = Path(__file__).parent
# Short questions that mean one entry of a family after another entry of the same family.
_ASIDES: dict[Language, tuple[str, ...]] = {
    "en": ("And {}?", "What about {}?", "and {}?", "How about {}?"),
    "zh": ("那{}呢？", "{}呢？", "那么{}呢？"),
}


@dataclass(frozen=True)
class Fact:
    """One fact in one language: equivalent questions, indirect clauses, one answer; `twin` answers in the other.

    `asides` are short questions that mean this fact when they come after one of the facts or families named in `after`.
    """

    name: str
    language: Language
    questions: tuple[str, ...]
    answer: str
    twin: str
    weight: float = 1.0
    indirect: tuple[str, ...] = ()
    asides: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def ask(self, rng: Random, *, fresh: bool = False) -> str:
        """The question in some words; `fresh` uses wrappers that training never does."""
        if fresh:
            return rephrase_fresh(rng.choice(self.questions), self.language, rng)
        if self.indirect and rng.random() < 0.3:
            return rephrase_indirect(rng.choice(self.indirect), self.language, rng)
        return rephrase(rng.choice(self.questions), self.language, rng)

    def follows(self, other: Fact) -> bool:
        """Whether one of `asides`, said after the other fact, means this one."""
        return other.language == self.language and other.name.partition(":")[0] in self.after


def load_facts() -> list[Fact]:
    """All facts, both languages."""
    singles = tomllib.loads((_HERE / "facts.toml").read_text(encoding="utf-8"))["fact"]
    families = tomllib.loads((_HERE / "pairs.toml").read_text(encoding="utf-8"))["family"]
    facts = [fact for table in singles for fact in _single(table)]
    facts += [fact for table in families for fact in _family(table)]
    facts += [fact for a in range(1, 10) for b in range(1, 10) for fact in _product(a, b)]
    return facts


def _single(table: dict[str, Any]) -> Iterator[Fact]:
    for language, other in (("en", "zh"), ("zh", "en")):
        yield Fact(
            name=table["name"],
            language=language,  # type: ignore[arg-type]
            questions=tuple(table[language]),
            answer=table[f"{language}_answer"],
            twin=table[f"{other}_answer"],
            weight=table.get("weight", 1),
            indirect=tuple(table.get(f"{language}_indirect", ())),
            asides=tuple(table.get(f"{language}_asides", ())),
            after=tuple(table.get("after", ())),
        )


def _family(table: dict[str, Any]) -> Iterator[Fact]:
    # A family's entries share the weight of about three single facts, so that long lists do not crowd out the rest.
    for en, en2, zh, zh2 in table["entries"]:
        slots = {"en": en, "en2": en2, "zh": zh, "zh2": zh2}
        answers = {language: _sentence(table[f"{language}_answer"].format_map(slots)) for language in ("en", "zh")}
        for language, other in (("en", "zh"), ("zh", "en")):
            yield Fact(
                name=f"{table['name']}:{en}",
                language=language,  # type: ignore[arg-type]
                questions=tuple(question.format_map(slots) for question in table[language]),
                answer=answers[language],
                twin=answers[other],
                weight=0.35 * table["weight"],
                asides=tuple(aside.format(slots[language]) for aside in _ASIDES[language]),
                after=(table["name"],),
            )


def _product(a: int, b: int) -> Iterator[Fact]:
    """An entry of the multiplication table: learned by heart, so not among the tasks that are held out."""
    product = f"{a} × {b}"
    answer = f"{product} = {a * b}"
    en = (
        f"What is {a} times {b}?",
        f"What is {product}?",
        f"{product} = ?",
        f"{a}*{b}",
        f"{a} * {b} =",
        f"{a} x {b} = ?",
    )
    zh = (f"{a}乘以{b}等于多少？", f"{a}×{b}等于几？", f"{a}乘{b}是多少？", f"{product} 等于多少？", f"{a}*{b}等于几？")
    yield Fact(f"product:{product}", "en", en, answer, answer, weight=0.12)
    yield Fact(f"product:{product}", "zh", zh, answer, answer, weight=0.12)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
