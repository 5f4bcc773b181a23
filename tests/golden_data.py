"""The golden checkpoints: folders to load, what they must answer, and how close."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = ("cla2_top1", "cla2_top2", "cla4_top1", "nocla_tied", "cla2_dense")
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
    """An ordinary checkpoint folder."""
    items: list[GoldenItem]
    bfloat16_tolerance: float
    """Most that the mean |Δ prompt_logprobs| of a bfloat16 run may be."""


def load_golden(name: str) -> Golden:
    """Read tests/golden/`name`."""
    record = json.loads((GOLDEN / name / "reference.json").read_text())
    items = [GoldenItem(**item) for item in record["items"]]
    return Golden(GOLDEN / name, items, max(0.03, 1.5 * record["bfloat16_mean_distance"]))
