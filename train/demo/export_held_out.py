"""Write the held-out questions that the package's evaluation asks, as JSON lines: python train/demo/export_held_out.py

The choices of a question are its answer and three near misses, one character away from it, in a fixed random order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Annotated, Any, Final

import typer
from questions import LANGUAGES, held_out_tasks

__all__ = ["PER_LANGUAGE", "TARGET", "rows"]

TARGET: Final = Path(__file__).parents[2] / "hunyuan_vllm" / "evaluation" / "tasks" / "held_out.jsonl"
PER_LANGUAGE: Final = 60
CHOICES: Final = 4


def rows(per_language: int = PER_LANGUAGE, seed: int = 5) -> Iterator[dict[str, Any]]:
    """One row a question, in the order of `held_out_tasks`."""
    rng = Random(seed)
    asked = list(held_out_tasks(per_language))
    characters = sorted({character for one in asked for character in one.answer if "一" <= character <= "鿿"})
    kinds = (digits, ascii_lowercase, ascii_uppercase, "".join(characters))
    for number, one in enumerate(asked):
        choices = [one.answer, *_near_misses(one.answer, kinds, rng)]
        rng.shuffle(choices)
        yield {
            "group": one.group,
            "language": LANGUAGES[number // per_language % len(LANGUAGES)],
            "system": one.system,
            "question": one.prompt,
            "answer": one.answer,
            "choices": choices,
            "gold": choices.index(one.answer),
        }


def _near_misses(answer: str, kinds: Sequence[str], rng: Random) -> list[str]:
    """Three answers with one character replaced by another of its kind."""
    places = [(place, kind) for place, character in enumerate(answer) for kind in kinds if character in kind]
    found: dict[str, None] = {}  # a set in the order in which it was filled
    while len(found) < CHOICES - 1:
        place, kind = rng.choice(places)
        miss = answer[:place] + rng.choice(kind) + answer[place + 1 :]
        if miss != answer:
            found[miss] = None
    return list(found)


def main(target: Annotated[Path, typer.Option(help="Directory to write.")] = TARGET) -> None:
    """Write the held-out questions."""
    partial = target.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()), encoding="utf-8")
    os.replace(partial, target)


if __name__ == "__main__":
    typer.run(main)
