"""The demo model's held-out questions: problems that its training text contains in no wording, each with one answer.

`held_out.jsonl` is written by train/demo/export_held_out.py, and is also the data of the lm-evaluation-harness tasks
beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hunyuan_vllm.evaluation.benchmarks import TASKS_FOLDER
from hunyuan_vllm.evaluation.passages import Passage, chat_passage

__all__ = ["MAX_ANSWER", "Question", "held_out_questions"]

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


def held_out_questions(each: int | None = None) -> list[Question]:
    """All of them, or the first `each` of every kind and language."""
    fields = Question.__dataclass_fields__
    lines = (TASKS_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows: Sequence[dict[str, Any]] = [json.loads(line) for line in lines]
    asked: dict[tuple[str, str], int] = {}
    questions = []
    for row in rows:
        question = Question(**{name: row[name] for name in fields})
        kind = (question.group, question.language)
        asked[kind] = asked.get(kind, 0) + 1
        if each is None or asked[kind] <= each:
            questions.append(question)
    return questions
