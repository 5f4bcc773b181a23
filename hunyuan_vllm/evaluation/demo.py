"""`hunyuan-vllm eval demo`: accuracy and distance of each scheme on the demo model's held-out questions"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from hunyuan_vllm.evaluation.compare import Distance, measure, percent
from hunyuan_vllm.evaluation.engines import Outcome, Work
from hunyuan_vllm.evaluation.passages import MAX_ANSWER, Question, held_out_questions
from hunyuan_vllm.evaluation.variants import Variant
from hunyuan_vllm.server.models import ModelSource
from hunyuan_vllm.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Row:
    """One scheme.

    Attributes:
        right: right answers by kind of problem; a right answer is exactly the expected text, after which the model
            stopped.
        asked: questions by kind.
        distance: from BF16, over the tokens of the right answers; None for BF16 itself.
    """

    scheme: str
    right: Counter[str]
    asked: Counter[str]
    distance: Distance | None = None

    @property
    def accuracy(self) -> float:
        return self.right.total() / self.asked.total()


def held_out_work(questions: Sequence[Question], tokenizer: Any) -> Work:
    """Score the right answers, and answer the questions."""
    passages = [question.passage(tokenizer) for question in questions]
    return Work(passages, [passage.ids[: passage.scored[0]] for passage in passages], MAX_ANSWER)


def demo_rows(
    model: ModelSource, schemes: Sequence[str], each: int | None, flags: Sequence[str], console: Console
) -> list[Row]:
    """BF16 first, then each of `schemes`.

    Args:
        model: the demo model, or one trained like it.
        each: questions of each kind and language; None for all.

    Raises:
        UserError, EngineFailed: as `measure`.
    """
    tokenizer = load_tokenizer(model.name)
    questions = held_out_questions(each)
    work = held_out_work(questions, tokenizer)
    others = [Variant.parse(scheme) for scheme in schemes]
    first, outcome, compared = measure(model, Variant.parse("bf16"), others, work, flags, None, console)
    rows = [row_of(first.variant.label, outcome, questions, tokenizer)]
    rows += [row_of(one.run.variant.label, one.outcome, questions, tokenizer, one.distance) for one in compared]
    return rows


def row_of(
    scheme: str, outcome: Outcome, questions: Sequence[Question], tokenizer: Any, distance: Distance | None = None
) -> Row:
    """The row of a run that has answered `questions`."""
    right: Counter[str] = Counter()
    for question, answer in zip(questions, outcome.answers, strict=True):
        said = tokenizer.decode(answer.ids, skip_special_tokens=True)
        right[question.group] += int(answer.stopped and said == question.answer)
    return Row(scheme, right, Counter(question.group for question in questions), distance)


def rows_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every figure in full, and the right answers by kind."""
    return [
        {
            "scheme": row.scheme,
            "accuracy": row.accuracy,
            "asked": row.asked.total(),
            "right": dict(row.right),
            "distance": row.distance and asdict(row.distance),
        }
        for row in rows
    ]


def demo_table(rows: Sequence[Row]) -> Table:
    """One row a scheme."""
    table = Table(title=f"demo model, {rows[0].asked.total():,} held-out questions", title_justify="left")
    table.add_column("")
    for name in ("right", "points", "top-1 agreement", "KL mean", "p99", "perplexity ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [percent(row.accuracy), f"{100 * (row.accuracy - rows[0].accuracy):+.2f}"]
        if row.distance is None:
            cells = [cells[0]] + ["-"] * 5
        else:
            found = row.distance
            cells += [percent(found.agreement), f"{found.kl_mean:.2e}", f"{found.kl_p99:.2e}"]
            cells.append(f"{found.perplexity_ratio:.4f}")
        table.add_row(row.scheme, *cells)
    return table
