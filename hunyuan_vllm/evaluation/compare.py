"""Two schemes compared token by token: the statistics and the report"""

from __future__ import annotations

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

from hunyuan_vllm.evaluation.engines import Contestant, Outcome, Work, run
from hunyuan_vllm.evaluation.passages import BUILT_IN_TEXT, Passage, held_out_questions, read_passages
from hunyuan_vllm.evaluation.schemes import Scheme, checkpoint_of
from hunyuan_vllm.server.models import ModelSource
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import gigabytes


@dataclass(frozen=True)
class Distance:
    """How far B's predictions are from A's, over all scored tokens.

    Attributes:
        tokens: how many they are.
        perplexity_a, perplexity_b: exp of the mean negative log-likelihood of the text.
        agreement: share of tokens at which both find the same token likeliest.
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


def distance(a: Outcome, b: Outcome, scored: list[list[int]]) -> Distance:
    """The distance of B, which was compared with A's record, from A; `scored` are the passages' scored indices."""
    # KL is never negative; rounding of a sum over the vocabulary may say so.
    kl = np.maximum(b.joined("kl"), 0.0)
    where = [(passage, token) for passage, tokens in enumerate(scored) for token in tokens]
    return Distance(
        tokens=len(kl),
        perplexity_a=math.exp(np.mean(a.joined("nll"))),
        perplexity_b=math.exp(np.mean(b.joined("nll"))),
        agreement=float(np.mean(b.joined("same"))),
        kl_mean=float(kl.mean()),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        worst=where[int(kl.argmax())],
    )


def default_passages(model: ModelSource, tokenizer: Any, context: int) -> list[Passage]:
    """Of the demo model its held-out questions, of any other the built-in text."""
    if model.demo:
        return [question.passage(tokenizer) for question in held_out_questions()]
    return read_passages(BUILT_IN_TEXT, tokenizer, context)


@dataclass(frozen=True)
class Compared:
    """A contestant with what it did, and its distance from the first one."""

    contestant: Contestant
    outcome: Outcome
    distance: Distance


def measure(
    model: ModelSource,
    a: Scheme,
    others: Sequence[Scheme],
    work: Work,
    flags: Sequence[str],
    folder: Path | None,
    console: Console,
) -> tuple[Contestant, Outcome, list[Compared]]:
    """Let A do the work and keep its logits, then each of the others, and compare.

    Args:
        model: the checkpoint of the schemes that name none.
        flags: vLLM's own options, for all of them.
        folder: where A's logits are kept until the end; None for the temporary folder.

    Raises:
        UserError: it cannot work, for the reason given; no engine was started.
        EngineFailed: an engine did not start, or ended before it was done.
    """
    progress = Progress(console)
    contestants = [Contestant(scheme, checkpoint_of(scheme, model, progress), flags) for scheme in (a, *others)]
    for contestant in contestants:
        contestant.argv(work.longest, os.environ)  # finds mistakes before the first engine starts
    scored = [passage.scored for passage in work.passages]
    with _record(folder) as record:
        _check_space(Path(record), contestants[0], work)
        file = Path(record) / "logits"
        first = run(contestants[0], work, file, None, progress)
        compared = []
        for contestant in contestants[1:]:
            outcome = run(contestant, work, file, first.format, progress)
            compared.append(Compared(contestant, outcome, distance(first, outcome, scored)))
    return contestants[0], first, compared


def _record(folder: Path | None) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="hunyuan-vllm-eval-", dir=folder)
    except OSError as error:
        raise UserError(f"--work {folder}: {error.strerror}; name a folder that can be written to") from None


def _check_space(folder: Path, contestant: Contestant, work: Work) -> None:
    config = contestant.model.config
    if config is None:  # a hub name, which vLLM has yet to fetch
        return
    tokens = sum(len(passage.scored) for passage in work.passages)
    needed = tokens * config.vocab_size * (4 if "float32" in contestant.flags else 2)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the logits of {tokens:,} tokens need {gigabytes(needed)} and {folder.parent} has {gigabytes(free)} free: "
            "name another folder with --work, or fewer tokens with --limit"
        )


@dataclass(frozen=True)
class Limits:
    """What a contestant must keep to; None asks for nothing."""

    agreement: float | None = None
    kl: float | None = None
    perplexity_ratio: float | None = None

    def broken(self, name: str, found: Distance) -> list[str]:
        """The limits that `found` breaks, each in words."""
        problems = []
        if self.agreement is not None and found.agreement < self.agreement:
            problems.append(f"top-1 agreement {percent(found.agreement)} is below {percent(self.agreement)}")
        if self.kl is not None and found.kl_mean > self.kl:
            problems.append(f"mean KL {found.kl_mean:.2e} is above {self.kl:.2e}")
        if self.perplexity_ratio is not None and found.perplexity_ratio > self.perplexity_ratio:
            problems.append(f"perplexity ratio {found.perplexity_ratio:.4f} is above {self.perplexity_ratio:.4f}")
        return [f"{name}: {problem}" for problem in problems]


def distance_table(a: str, compared: Sequence[Compared]) -> Table:
    """One row a contestant, with what it is measured against in the title."""
    first = compared[0].distance
    table = Table(
        title=f"against {a}, whose perplexity is {first.perplexity_a:.4f}; {first.tokens:,} tokens",
        title_justify="left",
    )
    table.add_column("")
    for name in ("perplexity", "ratio", "top-1 agreement", "KL mean", "median", "p99", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in compared:
        found = one.distance
        tail = (found.kl_mean, found.kl_median, found.kl_p99, found.kl_max)
        table.add_row(
            one.contestant.scheme.label,
            f"{found.perplexity_b:.4f}",
            f"{found.perplexity_ratio:.4f}",
            percent(found.agreement),
            *(f"{value:.2e}" for value in tail),
        )
    return table


def distances_json(model: str, a: str, compared: Sequence[Compared]) -> dict[str, Any]:
    """The same, with every figure in full."""
    return {
        "model": model,
        "a": a,
        "compared": [
            {
                "b": one.contestant.scheme.label,
                "checkpoint": one.contestant.model.given,
                **asdict(one.distance),
                "perplexity_ratio": one.distance.perplexity_ratio,
            }
            for one in compared
        ],
    }


def percent(share: float) -> str:
    """As in 98.25%."""
    return f"{100 * share:.2f}%"
