"""`hunyuan-vllm eval tasks`: which tasks, how, on which server; each result kept as soon as it is there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from hunyuan_vllm.client import connect, find_key
from hunyuan_vllm.errors import UserError
from hunyuan_vllm.evaluation.benchmarks import PUBLISHED, Setting, setting
from hunyuan_vllm.evaluation.harness import Harness, ServerFailed, TaskResult
from hunyuan_vllm.util.files import replacing

__all__ = ["ServerFailed", "Wanted", "Where", "run", "scores_json", "scores_table"]


@dataclass(frozen=True)
class Wanted:
    """What is asked.

    Attributes:
        tasks: names with commas between them; `published` stands for those of the published table.
        shots, chat: instead of each task's setting; None leaves it.
        limit: questions of each task; None for all.
        samples: keep questions and answers in `output`.
        output: a JSON file for everything that was found.
    """

    tasks: str
    shots: int | None = None
    chat: bool | None = None
    limit: int | None = None
    samples: bool = False
    output: Path | None = None

    @property
    def names(self) -> list[str]:
        """Each task once, in order."""
        given = [name.strip() for name in self.tasks.split(",") if name.strip()]
        names = [name for one in given for name in (PUBLISHED if one == "published" else [one])]
        if not names:
            raise UserError("--tasks is empty: name one, as in --tasks hunyuan_demo")
        return list(dict.fromkeys(names))

    def setting(self, name: str) -> Setting:
        """How a task is asked."""
        usual = setting(name)
        return replace(
            usual,
            shots=usual.shots if self.shots is None else self.shots,
            chat=usual.chat if self.chat is None else self.chat,
        )


@dataclass(frozen=True)
class Where:
    """Whom it is asked."""

    url: str
    model: str | None = None
    tokenizer: str | None = None
    api_key_file: Path | None = None
    include: Path | None = None
    concurrency: int = 16


def run(wanted: Wanted, where: Where) -> list[TaskResult]:
    """Ask everything; `wanted.output` holds what is there so far after each task.

    Raises:
        UserError: something given is of no use.
        ServerFailed: the server stopped answering.
    """
    names = wanted.names
    if wanted.samples and wanted.output is None:
        raise UserError("--samples needs --output, the file that they go to")
    if wanted.output is not None and not wanted.output.absolute().parent.is_dir():
        raise UserError(f"--output {wanted.output}: there is no folder {wanted.output.absolute().parent}")
    served = connect(where.url, find_key(where.url, where.api_key_file, os.environ), where.model)
    harness = Harness(served, where.tokenizer or str(served.tokenizer), where.concurrency, where.include)
    for name in names:
        harness.load(name)  # finds mistakes before hours of questions
    results: list[TaskResult] = []
    for name in names:
        results.append(harness.run(name, wanted.setting(name), wanted.limit, wanted.samples))
        if wanted.output is not None:
            found = {"server": served.url, "model": served.name, "limit": wanted.limit}
            raw = {one.name: one.raw for one in results}
            _write(wanted.output, found | {"scores": scores_json(results), "raw": raw})
    return results


def scores_json(results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """Every score in full."""
    return [
        {
            "task": result.name,
            "shots": result.setting.shots,
            "chat": result.setting.chat,
            "questions": result.questions,
            "published": result.setting.published,
            "metrics": result.metrics,
        }
        for result in results
    ]


def scores_table(results: Sequence[TaskResult]) -> Table:
    """One row a metric of each task; of a group only the group's own."""
    table = Table("task", "asked as", title_justify="left")
    for name in ("questions", "metric", "score", "± standard error", "published BF16 / FP8"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        chat = "chat" if result.setting.chat else "text"
        asked = f"{chat}, {result.setting.shots} shots" if result.setting.shots else chat
        published = " / ".join(map(str, result.setting.published or ())) or "-"
        own = result.metrics.get(result.name) or {}
        for metric, (value, error) in own.items():
            spread = "-" if error is None else f"{100 * error:.2f}"
            table.add_row(result.name, asked, f"{result.questions:,}", metric, f"{100 * value:.2f}", spread, published)
    return table


def _write(file: Path, content: Any) -> None:
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
