"""What the demo model learns from fine-tuning on the shipped data, and what it forgets.

    python benchmarks/finetune_quality.py

Runs `python -m hunyuan_vllm.train` twice, with LoRA (its defaults for the demo model) and with all weights, merges the
adapter as `hunyuan-vllm merge-lora` does, and asks all three models the held-out questions of train/data (a town and
lists) and those of hunyuan_vllm/evaluation (what the demo model could do before). An answer is correct if it is the
whole expected text and the model stopped after it; at temperature 0, in float32.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import REPOSITORY, Report, note, options

from hunyuan_vllm.demo import path as demo_path
from hunyuan_vllm.evaluation.passages import MAX_ANSWER, held_out_questions
from hunyuan_vllm.quantize.source import Source
from hunyuan_vllm.reference import HunYuanForCausalLM
from hunyuan_vllm.tokenizer import load_tokenizer
from hunyuan_vllm.train.merge import SAVE_DTYPES, Adapter, Merge
from hunyuan_vllm.train.messages import Conversation

HELD_OUT = REPOSITORY / "train" / "data" / "held_out.jsonl"
FULL = ("--learning_rate", "5e-4", "--max_steps", "250")


@dataclass(frozen=True)
class Question:
    """What is asked; `group` is what a table counts it under."""

    group: str
    messages: list[dict[str, str]]
    answer: str


def questions(each: int | None) -> list[Question]:
    found = []
    for line in HELD_OUT.read_text(encoding="utf-8").splitlines():
        given = json.loads(line)
        messages = Conversation.model_validate(given).as_dicts()
        found.append(Question(given["group"], messages[:-1], messages[-1]["content"]))
    kinds: Counter[tuple[str, str]] = Counter()
    for old in held_out_questions():
        kinds[old.group, old.language] += 1
        if each is not None and kinds[old.group, old.language] > each:
            continue
        system = [{"role": "system", "content": old.system}] if old.system else []
        found.append(Question("before", [*system, {"role": "user", "content": old.question}], old.answer))
    return found


@torch.inference_mode()
def right_answers(directory: Path, asked: Sequence[Question]) -> Counter[str]:
    """Right answers by group; questions of one length are asked together."""
    tokenizer = load_tokenizer(demo_path())
    model = HunYuanForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    (stop,) = tokenizer.convert_tokens_to_ids(["<|eos|>"])
    by_length: dict[int, list[tuple[Question, list[int]]]] = defaultdict(list)
    for one in asked:
        ids = tokenizer.apply_chat_template(one.messages, add_generation_prompt=True, return_dict=False)
        by_length[len(ids)].append((one, ids))
    right: Counter[str] = Counter()
    for pairs in by_length.values():
        out, _ = model.greedy(torch.tensor([ids for _, ids in pairs]), MAX_ANSWER, stop_ids=(stop,))
        for (one, _), row in zip(pairs, out.tolist(), strict=True):
            said = tokenizer.decode(row[: row.index(stop)]) if stop in row else None
            right[one.group] += said == one.answer
    return right


def train(output: Path, threads: int, *flags: str) -> float:
    """Seconds of a run."""
    command = [sys.executable, "-m", "hunyuan_vllm.train", "--output_dir", str(output), *flags]
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    return time.perf_counter() - start


def main() -> None:
    parser = options(__doc__, rounds=None)
    parser.add_argument("--each", type=int, help="old questions of each kind and language (default: all 1,680)")
    parser.add_argument("--flags", default="", help="more flags of training, for both runs")
    parser.add_argument("--full-flags", default=" ".join(FULL), help="of the run with all weights (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report("finetune_quality", arguments)
    asked = questions(arguments.each)
    totals = Counter(one.group for one in asked)
    directory = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
    rows: list[tuple[str, Path, float | None]] = [("before", demo_path(), None)]
    try:
        note("LoRA")
        seconds = train(directory / "lora", arguments.threads, *arguments.flags.split())
        base = Source(demo_path())
        Merge(base, Adapter(directory / "lora" / "final", base.config), directory / "merged", SAVE_DTYPES["fp32"]).run()
        rows.append(("LoRA, merged", directory / "merged", seconds))
        note("all weights")
        flags = ["--use_lora", "false", *arguments.flags.split(), *arguments.full_flags.split()]
        seconds = train(directory / "full", arguments.threads, *flags)
        rows.append(("all weights", directory / "full" / "final", seconds))
        for name, model, seconds in rows:
            note(f"asking: {name}")
            right = right_answers(model, asked)
            cells: dict[str, Any] = {group: f"{right[group] / totals[group]:.1%}" for group in totals}
            new = sum(right[group] for group in ("town", "list")) / (totals["town"] + totals["list"])
            report.add(
                f"right answers of {dict(totals)}", model=name, new=f"{new:.1%}", **cells, seconds=seconds or "-"
            )
    finally:
        shutil.rmtree(directory)
    report.show()


if __name__ == "__main__":
    main()
