"""`hunyuan-vllm eval compare` and `demo`: one contestant is the measure, the others are set against it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.evaluation.checkpoints import checkpoint_of
from hunyuan_vllm.evaluation.held_out import held_out_questions
from hunyuan_vllm.evaluation.passages import BUILT_IN_TEXT, Passage, read_passages
from hunyuan_vllm.evaluation.runs import Contestant, Outcome, Work, run
from hunyuan_vllm.evaluation.schemes import Scheme
from hunyuan_vllm.evaluation.statistics import Distance, distance
from hunyuan_vllm.quantize.progress import Progress, gigabytes
from hunyuan_vllm.server.model_source import ModelSource

__all__ = ["Compared", "default_passages", "measure"]


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
