"""The shipped sets: made by their script, small, of use, and apart from what is held out."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from hunyuan_vllm.demo import path as demo_path
from hunyuan_vllm.evaluation.passages import held_out_questions
from hunyuan_vllm.tokenizer import load_tokenizer
from hunyuan_vllm.train.dataset import Encoding, scan

DIRECTORY = Path(__file__).parents[2] / "train" / "data"
sys.path.insert(0, str(DIRECTORY))

from make import held_out_lines, train_lines  # noqa: E402


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DIRECTORY / name).read_text(encoding="utf-8").splitlines()]


def said(found: list[dict[str, Any]], role: str) -> list[str]:
    return [turn["content"] for line in found for turn in line["messages"] if turn["role"] == role]


def test_the_script_writes_them() -> None:
    assert list(train_lines()) == lines("train.jsonl")
    assert list(held_out_lines()) == lines("held_out.jsonl")
    assert sum((DIRECTORY / name).stat().st_size for name in ("train.jsonl", "held_out.jsonl")) < 200_000


def test_every_line_is_of_use() -> None:
    tokenizer = load_tokenizer(demo_path())
    for name in ("train.jsonl", "held_out.jsonl"):
        found = scan(DIRECTORY / name, Encoding(tokenizer, 128))
        assert (found.bad_count, found.truncated, found.without_answer) == (0, 0, 0)


def test_nothing_held_out_is_trained_on() -> None:
    train, held_out = lines("train.jsonl"), lines("held_out.jsonl")
    questions = {question.lower().rstrip("?？ .。!") for question in said(train, "user")}
    asked = said(held_out, "user")
    assert not questions & {question.lower().rstrip("?？ .。!") for question in asked}
    answers = set(said(train, "assistant"))
    groups = Counter(line["group"] for line in held_out)
    for line in held_out:  # a fact's answer is what training teaches; a list's is new
        assert (line["messages"][-1]["content"] in answers) == (line["group"] == "town")
    assert groups == {"town": 72, "list": 72}
    assert not questions & {question.question.lower().rstrip("?？ .。!") for question in held_out_questions()}
