"""Measure a demo checkpoint on questions it has not seen, print a table, write report.json.

Run `python train/demo/evaluate.py`.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import questions
import torch
import typer
from encoding import Encoder
from questions import Asked
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig
from vocabulary import VOCABULARY_FILE

from hunyuan_vllm.reference import HunYuanForCausalLM

__all__ = ["Answerer", "Score", "expert_shares", "score"]

REPORT: Final = Path(__file__).parent / "report.json"
# The longest right answer has about 60 tokens.
MAX_NEW_TOKENS: Final = 96


class Answerer:
    """A checkpoint that answers batches of questions, at temperature 0 or with its generation_config's sampling."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.encoder = Encoder(directory / "hy.tiktoken")
        self.model = HunYuanForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        self.sampling = GenerationConfig.from_pretrained(directory)
        self.stops = set(self.sampling.eos_token_id)

    @torch.inference_mode()
    def answer(self, asked: Sequence[Asked], *, sample: bool = False) -> list[str | None]:
        """Answers in order; None where the model did not stop by itself."""
        prompts = [self.encoder.prompt(one.system, one.history, one.prompt) for one in asked]
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            by_length[len(prompt)].append(index)
        answers: list[str | None] = [None] * len(asked)
        for length, members in by_length.items():
            ids = torch.tensor([prompts[index] for index in members])  # [prompts of this length, tokens]
            if sample:
                whole = self.model.generate(ids, _limited(self.sampling), attention_mask=torch.ones_like(ids))
                out = whole[:, length:]
            else:
                out, _ = self.model.greedy(ids, MAX_NEW_TOKENS, stop_ids=tuple(self.stops))
            for index, row in zip(members, out.tolist(), strict=True):
                answers[index] = self._text(row)
        return answers

    def _text(self, row: list[int]) -> str | None:
        ends = [place for place, token in enumerate(row) if token in self.stops]
        return self.encoder.decode(row[: ends[0]]) if ends else None


def _limited(published: GenerationConfig) -> GenerationConfig:
    """The published sampling settings with a limit on the length."""
    return GenerationConfig(**{**published.to_diff_dict(), "max_new_tokens": MAX_NEW_TOKENS})


class Score(Counter[str]):
    """Counts of `asked`, `right` and `stopped` answers."""

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self["right"] / self["asked"]


def score(asked: Sequence[Asked], answers: Iterable[str | None]) -> dict[str, Score]:
    """Counts by group; an answer is right if it is the expected text, whole, and the model stopped after it."""
    scores: dict[str, Score] = defaultdict(Score)
    for one, answer in zip(asked, answers, strict=True):
        scores[one.group].update(asked=1, right=int(answer == one.answer), stopped=int(answer is not None))
    return dict(scores)


@torch.inference_mode()
def expert_shares(answerer: Answerer, asked: Sequence[Asked]) -> list[list[float]]:
    """Share of tokens that each expert of each layer gets, over prompts."""
    counts: list[torch.Tensor] = []
    for one in asked:
        ids = torch.tensor([answerer.encoder.prompt(one.system, one.history, one.prompt)])
        routed = answerer.model.model(ids).router_logits
        chosen = [logits.argmax(-1).bincount(minlength=logits.shape[-1]) for logits in routed]
        counts = [a + b for a, b in zip(counts, chosen, strict=True)] if counts else chosen
    return [[round(x, 3) for x in (layer / layer.sum()).tolist()] for layer in counts]


def measure(
    directory: Path, per_language: int, samples: int, seed: int, wrong: list[tuple[str, Asked, str | None]]
) -> dict[str, Any]:
    """All measurements of a checkpoint; what went wrong is appended to `wrong`."""
    answerer = Answerer(directory)
    torch.manual_seed(seed)
    sets = {
        "held-out tasks": list(questions.held_out_tasks(per_language)),
        "facts in fresh words": list(questions.fresh_facts()),
        "unknown": list(questions.unknown(per_language)),
        "examples": list(questions.examples()),
    }
    runs = {name: (asked, answerer.answer(asked)) for name, asked in sets.items()}
    for name in ("held-out tasks", "facts in fresh words"):
        runs[f"{name}, sampled"] = sets[name], answerer.answer(sets[name], sample=True)
    many = sets["examples"] * samples
    runs["examples, sampled"] = many, answerer.answer(many, sample=True)
    tasks = sets["held-out tasks"]
    runs["held-out tasks, bfloat16"] = tasks, Answerer(directory, torch.bfloat16).answer(tasks)
    for name, (asked, answers) in runs.items():
        wrong += [(name, one, answer) for one, answer in zip(asked, answers, strict=True) if answer != one.answer]
    return {
        "scores": {name: _rounded(score(asked, answers)) for name, (asked, answers) in runs.items()},
        "expert_shares": expert_shares(answerer, sets["held-out tasks"][:300]),
        "parameters": sum(parameter.numel() for parameter in answerer.model.parameters()),
    }


def _rounded(scores: dict[str, Score]) -> dict[str, dict[str, float]]:
    total: Score = Score()
    for one in scores.values():
        total.update(one)
    return {name: {**one, "accuracy": round(one.accuracy, 4)} for name, one in {**scores, "all": total}.items()}


def main(
    directory: Annotated[Path, typer.Option(help="Directory of the checkpoint.")] = VOCABULARY_FILE.parent,
    per_language: Annotated[int, typer.Option(help="Questions for each task and language.")] = 100,
    samples: Annotated[int, typer.Option(help="Samples of each of the README's questions.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    report: Annotated[Path, typer.Option(help="File to write the report to.")] = REPORT,
    show_wrong: Annotated[int, typer.Option(help="Print that many wrong answers of each set.")] = 0,
) -> None:
    """Measure a demo checkpoint, print a table and write the report."""
    torch.set_num_threads(threads)
    wrong: list[tuple[str, Asked, str | None]] = []
    result = measure(directory, per_language, samples, seed, wrong)
    console = Console()
    for name, groups in result["scores"].items():
        table = Table("group", "asked", "right", "stopped", "accuracy", title=name)
        for group, one in groups.items():
            table.add_row(group, *(str(one[key]) for key in ("asked", "right", "stopped")), f"{one['accuracy']:.1%}")
        console.print(table)
        for _, asked, answer in [item for item in wrong if item[0] == name][:show_wrong]:
            console.print(f"{asked.prompt!r}: {answer!r} instead of {asked.answer!r}", markup=False, highlight=False)
    console.print("expert shares by layer:", result["expert_shares"])
    partial = report.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, report)


if __name__ == "__main__":
    typer.run(main)
