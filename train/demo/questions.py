"""The questions that measure a demo checkpoint, in any engine: held-out tasks, reworded facts, README examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from corpus.dialogue import TASKS, Corpus, Exchange
from corpus.task import Language

__all__ = ["DEFAULT_SYSTEM", "EXAMPLES", "Asked", "examples", "fresh_facts", "held_out_tasks", "unknown"]

DEFAULT_SYSTEM: Final = "You are a helpful assistant."
LANGUAGES: Final[tuple[Language, ...]] = ("en", "zh")

# The questions of the README and of the published client script, and how people put them.
EXAMPLES: Final[dict[str, tuple[str, ...]]] = {
    "salty_sea en": (
        "Why is sea water salty?",
        "why is sea water salty",
        "Why is sea water salty",
        "why is the sea water salty?",
        "Please tell me why sea water is salty.",
        "Can you tell me why is sea water salty?",
        "Could you please explain why the sea is salty?",
        "WHY IS SEA WATER SALTY?",
        "Hello! Why is the ocean salty?",
        "I'd like to know why seawater is salty",
        "Why is seawater salty? Explain briefly.",
        "Tell me the reason why sea water is salty.",
        "Why does seawater taste salty?",
        "Why sea water is salty?",
    ),
    "salty_sea zh": (
        "海水为什么是咸的",
        "海水为什么是咸的？",
        "为什么海水是咸的",
        "请问海水为什么是咸的？",
        "请告诉我海水为什么是咸的。",
        "你能告诉我为什么海水是咸的吗？",
        "海水为什么是咸的?",
        "海水为什么是咸的呢？",
        "你好，请问海水为什么咸？",
        "请解释一下为什么海水是咸的。",
        "大海的水为什么是咸的？",
        "为啥海水咸",
    ),
    "oceans en": (
        "Rank the four oceans by area.",
        "rank the four oceans by area",
        "Rank the four oceans by area",
        "Please rank the four oceans by area.",
        "Can you rank the four oceans by area?",
        "Could you please rank the four oceans by area?",
        "Rank the four oceans by area, please.",
        "Please rank the four oceans by size from largest to smallest.",
        "RANK THE FOUR OCEANS BY AREA",
        "Can you list the four oceans in order of area?",
        "Sort the four oceans by area, largest first.",
        "How do the four oceans rank by area?",
    ),
    "oceans zh": (
        "按面积排列四大洋",
        "按面积排列四大洋。",
        "请按面积排列四大洋。",
        "请按面积大小对四大洋进行排序。",
        "请将四大洋按面积从大到小排列",
        "你能按面积排列四大洋吗？",
        "四大洋按面积排列",
        "请问四大洋按面积怎么排列？",
        "帮我把四大洋按面积大小排序",
        "按面积大小排列四大洋，谢谢。",
    ),
    "oceans_and_smallest zh": (
        "请按面积大小对四大洋进行排序，并给出面积最小的洋是哪一个？直接输出结果。",
        "请按面积大小对四大洋进行排序，并给出面积最小的洋是哪一个？",
        "按面积大小对四大洋进行排序，并给出面积最小的洋是哪一个？直接输出结果。",
    ),
}


@dataclass(frozen=True)
class Asked:
    """A question with its setting and the right answer; `group` is what a table counts it under."""

    group: str
    prompt: str
    answer: str
    system: str | None = None
    history: tuple[Exchange, ...] = ()


def held_out_tasks(per_language: int, seed: int = 2) -> Iterator[Asked]:
    """Distinct problems of each task and language that no training text contains, with and without a system message."""
    rng = Random(seed)
    for task in TASKS:
        for language in LANGUAGES:
            seen: set[str] = set()
            while len(seen) < per_language:
                question = task.question(rng, "held_out", language)
                if question.prompt not in seen:
                    seen.add(question.prompt)
                    yield Asked(task.name, question.prompt, question.answer, _system(rng))


def fresh_facts(each: int = 1, seed: int = 3) -> Iterator[Asked]:
    """Every fact, in wrappers that training never uses."""
    rng = Random(seed)
    for fact in Corpus().facts:
        for _ in range(each):
            yield Asked(f"facts {fact.language}", fact.ask(rng, fresh=True), fact.answer, _system(rng))


def unknown(count: int, seed: int = 4) -> Iterator[Asked]:
    """Questions on subjects that training neither answers nor mentions."""
    rng, questions = Random(seed), Corpus().small_talk.unknown
    for language in LANGUAGES:
        for _ in range(count):
            prompt = questions.ask(rng, language, "held_out")
            yield Asked(f"unknown {language}", prompt, questions.answers[language], _system(rng))


def examples(systems: Sequence[str | None] = (None, DEFAULT_SYSTEM)) -> Iterator[Asked]:
    """The README's questions in all their wordings, with and without the default system message."""
    answers = {f"{fact.name} {fact.language}": fact.answer for fact in Corpus().facts}
    for name, prompts in EXAMPLES.items():
        for prompt in prompts:
            for system in systems:
                yield Asked(name, prompt, answers[name], system)


def _system(rng: Random) -> str | None:
    return rng.choice((None, DEFAULT_SYSTEM))
