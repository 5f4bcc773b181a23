"""Variants compared token by token: the statistics and the report"""

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hunyuan_vllm.evaluation.engines import EngineRun, Scores, Variant, checkpoint_of, execute, longest
from hunyuan_vllm.evaluation.passages import BUILT_IN_TEXT, Passage, held_out_questions, read_passages
from hunyuan_vllm.server.models import ModelSource
from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import gigabytes


@dataclass(frozen=True)
class Distance:
    """How far B's predictions are from A's, over all scored tokens.

    Attributes:
        perplexity_a, perplexity_b: exp of the mean negative log-likelihood of the text.
        agreement: share of tokens at which both give the same token the highest probability.
        kl_mean, kl_median, kl_p99, kl_max: of KL(A‖B) over the whole vocabulary, in nats.
        worst: (passage, token) of the largest KL, both counted from 0; the token as an index into the passage.
    """

    tokens: int
    perplexity_a: float
    perplexity_b: float
    agreement: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    worst: tuple[int, int]

    @property
    def perplexity_ratio(self) -> float:
        """B's perplexity over A's."""
        return self.perplexity_b / self.perplexity_a


def distance(a: Scores, b: Scores, scored: list[list[int]]) -> Distance:
    """How far B is from A, with whose record it was compared; `scored` are the passages' scored indices."""
    # Rounding may make a KL slightly negative.
    kl = np.maximum(b["kl"], 0.0)
    where = [(passage, token) for passage, tokens in enumerate(scored) for token in tokens]
    return Distance(
        tokens=len(kl),
        perplexity_a=math.exp(np.mean(a["nll"])),
        perplexity_b=math.exp(np.mean(b["nll"])),
        agreement=float(np.mean(b["same"])),
        kl_mean=float(kl.mean()),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        worst=where[int(kl.argmax())],
    )


def default_passages(model: ModelSource, tokenizer: Any, context: int) -> list[Passage]:
    """The held-out questions for the demo model, the built-in text for any other."""
    if model.demo:
        return [question.passage(tokenizer) for question in held_out_questions()]
    return read_passages(BUILT_IN_TEXT, tokenizer, context)


def measure(
    model: ModelSource,
    a: Variant,
    others: Sequence[Variant],
    passages: Sequence[Passage],
    flags: Sequence[str],
    directory: Path | None,
    console: Console,
) -> list[tuple[EngineRun, Distance]]:
    """Run A and keep its logits, then run each of the others and compare.

    Args:
        model: the checkpoint of the variants that name none.
        directory: where A's logits are kept until the end; None for the temporary directory.
    """
    progress = Progress(console)
    runs = [EngineRun(variant, checkpoint_of(variant, model, progress), flags) for variant in (a, *others)]
    for run in runs:
        run.argv(longest(passages), os.environ)  # reports mistakes before the first engine starts
    scored = [passage.scored for passage in passages]
    try:
        record = tempfile.TemporaryDirectory(prefix="hunyuan-vllm-eval-", dir=directory)
    except OSError as error:
        raise UserError(f"--work {directory}: {error.strerror}; name a writable directory") from None
    with record:
        _check_space(Path(record.name), runs[0], sum(map(len, scored)))
        file = Path(record.name) / "logits"
        first, logits = execute(runs[0], passages, file, None, progress)
        others_scores = [execute(run, passages, file, logits, progress)[0] for run in runs[1:]]
    return [(run, distance(first, found, scored)) for run, found in zip(runs[1:], others_scores, strict=True)]


def _check_space(directory: Path, run: EngineRun, tokens: int) -> None:
    config = run.model.config
    if config is None:  # a hub name, which vLLM has yet to fetch
        return
    itemsize = 4 if Flags(run.flags).get("dtype") in ("float32", "float") else 2
    needed = tokens * config.vocab_size * itemsize
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"the logits of {tokens:,} tokens need {gigabytes(needed)}, {directory.parent} has {gigabytes(free)} free: "
            "name another directory with --work, or fewer tokens with --limit"
        )


def distance_table(a: str, compared: Sequence[tuple[EngineRun, Distance]]) -> Table:
    """One row a run; the title names what it is measured against."""
    first = compared[0][1]
    title = f"against {a}, whose perplexity is {first.perplexity_a:.4f}; {first.tokens:,} tokens"
    table = Table("", title=title, title_justify="left")
    for name in ("perplexity", "ratio", "top-1 agreement", "KL mean", "median", "p99", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    for run, found in compared:
        perplexity = f"{found.perplexity_b:.4f}", f"{found.perplexity_ratio:.4f}"
        kl = (f"{value:.2e}" for value in (found.kl_mean, found.kl_median, found.kl_p99, found.kl_max))
        table.add_row(run.variant.label, *perplexity, f"{100 * found.agreement:.2f}%", *kl)
    return table


def distances_json(model: str, a: str, compared: Sequence[tuple[EngineRun, Distance]]) -> dict[str, Any]:
    """The same, with every figure in full."""
    rows = [
        {
            "b": run.variant.label,
            "checkpoint": run.model.given,
            **asdict(found),
            "perplexity_ratio": found.perplexity_ratio,
        }
        for run, found in compared
    ]
    return {"model": model, "a": a, "compared": rows}
