"""Write the sets that fine-tuning starts with: python train/data/make.py

`train.jsonl` teaches the demo model two things it cannot do: to answer questions about a town (town.toml), and to name
the first and the last item of a list. A part of its own training text is mixed in, so that it keeps what it knows.
`held_out.jsonl` asks about the same town in other words, and about other lists. Both are the same on every run.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Annotated, Any, Final

import typer

HERE: Final = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "demo"))

from corpus.dialogue import Chat, Corpus  # noqa: E402
from corpus.phrasing import rephrase, rephrase_fresh  # noqa: E402
from corpus.strings import WORDS  # noqa: E402

__all__ = ["held_out_lines", "train_lines"]

LANGUAGES: Final = ("en", "zh")
HELD_OUT_SHARE: Final = 0.15
TOWN, LISTS, KEPT = 288, 216, 384  # training conversations of each kind
ASKED_OF_A_LIST: Final = {
    "en": (
        "First and last item of: {list}",
        "What are the first and the last item: {list}?",
        "Give me the first and the last item: {list}",
        "Which items come first and last: {list}?",
    ),
    "zh": (
        "第一项和最后一项是什么：{list}",
        "找出第一项和最后一项：{list}",
        "说出第一个和最后一个：{list}",
        "第一项和最后一项：{list}",
    ),
}
ANSWER_OF_A_LIST: Final = {
    "en": "The first item is {first}. The last item is {last}.",
    "zh": "第一项是{first}。最后一项是{last}。",
}

Message = dict[str, str]


def train_lines(seed: int = 11) -> Iterator[dict[str, Any]]:
    """The conversations of train.jsonl, in random order."""
    rng = Random(seed)
    lines = [_line([_town(rng, number, held_out=False)]) for number in range(TOWN)]
    lines += [_line([_list(rng, number, held_out=False)]) for number in range(LISTS)]
    # Some have two turns: the second question comes behind an answer.
    for number in range(0, LISTS, 6):
        lines[TOWN + number] = _line([_town(rng, number, held_out=False), _list(rng, number, held_out=False)])
    corpus = Corpus()
    while len(lines) < TOWN + LISTS + KEPT:
        example = corpus.example(rng)
        if isinstance(example, Chat) and len(example.exchanges) == 1:
            turns = [(exchange.user, exchange.assistant) for exchange in example.exchanges]
            lines.append(_line(turns, system=example.system or ""))
    rng.shuffle(lines)
    yield from lines


def held_out_lines(seed: int = 12) -> Iterator[dict[str, Any]]:
    """The conversations of held_out.jsonl; `group` names the kind."""
    rng = Random(seed)
    for number in range(2 * len(_facts())):
        for _ in range(3):
            yield {"group": "town", **_line([_town(rng, number, held_out=True)])}
    for number in range(72):
        yield {"group": "list", **_line([_list(rng, number, held_out=True)])}


def _town(rng: Random, number: int, held_out: bool) -> tuple[str, str]:
    """A question and its answer; facts and languages take turns."""
    facts = _facts()
    fact, language = facts[number // 2 % len(facts)], LANGUAGES[number % 2]
    *known, last = fact[language]
    if held_out:
        question = rng.choice((last, rephrase_fresh(rng.choice(known), language, rng)))
    else:
        question = rephrase(rng.choice(known), language, rng)
    return question, fact[f"{language}_answer"]


def _list(rng: Random, number: int, held_out: bool) -> tuple[str, str]:
    language = LANGUAGES[number % 2]
    while True:
        pool = rng.choice((ascii_lowercase, "0123456789", WORDS))
        items = rng.sample(pool, rng.randint(3, 6))
        if _is_held_out(items) == held_out:
            break
    question = rng.choice(ASKED_OF_A_LIST[language]).format(list=rng.choice((" ", ", ")).join(items))
    return question, ANSWER_OF_A_LIST[language].format(first=items[0], last=items[-1])


def _is_held_out(items: list[str]) -> bool:
    """By first and last item: no training line has that pair."""
    digest = hashlib.sha256(f"{items[0]} {items[-1]}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def _line(turns: list[tuple[str, str]], system: str | None = None) -> dict[str, Any]:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def _facts() -> list[dict[str, Any]]:
    return tomllib.loads((HERE / "town.toml").read_text(encoding="utf-8"))["fact"]


def main(directory: Annotated[Path, typer.Option(help="Directory to write.")] = HERE) -> None:
    """Write both sets."""
    for name, lines in (("train.jsonl", train_lines()), ("held_out.jsonl", held_out_lines())):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        partial = directory / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, directory / name)
        print(f"{directory / name}: {text.count(chr(10)):,} conversations, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    typer.run(main)
