"""The golden checkpoints: directories to load, what they must answer, and how close. And the like for any checkpoint,
answered by the reference model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hunyuan_vllm.reference import HunYuanForCausalLM

GOLDEN = Path(__file__).parent / "golden"
LARGE_NAMES = ("cla2_top1", "cla2_top2", "cla4_top1", "nocla_tied", "cla2_dense")
V1_NAMES = ("v1_a13b", "v1_moe_tf", "v1_7b", "v1_1_8b", "v1_7b_0124")
GOLDEN_NAMES = LARGE_NAMES + V1_NAMES
FLOAT32_TOLERANCE = 2e-4


@dataclass(frozen=True)
class GoldenItem:
    """One prompt and the original code's float32 answer."""

    prompt: list[int]
    prompt_logprobs: list[float]
    """log p of prompt[i + 1] given prompt[: i + 1]; one fewer than the prompt has tokens."""
    greedy: list[int]
    greedy_logprobs: list[float]


@dataclass(frozen=True)
class Golden:
    """A golden checkpoint."""

    path: Path
    """An ordinary checkpoint directory."""
    items: list[GoldenItem]
    bfloat16_tolerance: float
    """Most that the mean |Δ prompt_logprobs| of a bfloat16 run may be."""


def load_golden(name: str) -> Golden:
    """Read tests/golden/`name`."""
    record = json.loads((GOLDEN / name / "reference.json").read_text())
    items = [GoldenItem(**item) for item in record["items"]]
    return Golden(GOLDEN / name, items, max(0.03, 1.5 * record["bfloat16_mean_distance"]))


@torch.inference_mode()
def prompt_logprobs(model: HunYuanForCausalLM, prompt: Sequence[int]) -> list[float]:
    """log p of prompt[i + 1] given prompt[: i + 1]."""
    ids = torch.tensor([prompt])
    logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()


def reference_answers(path: Path, prompts: Sequence[list[int]], max_new_tokens: int = 24) -> Golden:
    """What the reference model in float32 answers on a checkpoint, in the form of a golden record."""
    return answers_of(HunYuanForCausalLM.from_pretrained(path, dtype=torch.float32), path, prompts, max_new_tokens)


def answers_of(model: HunYuanForCausalLM, path: Path, prompts: Sequence[list[int]], max_new_tokens: int) -> Golden:
    """The same, of a reference model at hand."""
    items = []
    for prompt in prompts:
        tokens, logprobs = model.greedy(torch.tensor([prompt]), max_new_tokens)
        items.append(GoldenItem(prompt, prompt_logprobs(model, prompt), tokens[0].tolist(), logprobs[0].tolist()))
    return Golden(path, items, bfloat16_tolerance=float("nan"))
