"""The rates published for Hunyuan-Large, set against the roofline of the set-ups they were published for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_vllm.plan.models import open_planned
from hunyuan_vllm.plan.rates import decode
from hunyuan_vllm.plan.scenario import Scenario

__all__ = ["PublishedRate", "published_rates"]

DATA = Path(__file__).parent / "data" / "published.json"
SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_experts", "num_attention_heads")


@dataclass(frozen=True)
class PublishedRate:
    """Tokens a second that were published, and the bound of the same set-up."""

    batch: int
    rate: float
    bound: float

    @property
    def share(self) -> float:
        """Part of the bound that was reached."""
        return self.rate / self.bound


def published_rates(scenario: Scenario) -> list[PublishedRate]:
    """For a scenario that is one of the published set-ups (network, scheme, GPUs that share each layer); else none."""
    table: dict[str, Any] = json.loads(DATA.read_text())
    network = open_planned("hunyuan-large").config
    if any(getattr(network, name) != getattr(scenario.config, name) for name in SHAPE):
        return []
    if scenario.gpu.name != table["gpu"] or scenario.input_len != table["input_len"]:
        return []
    return [
        PublishedRate(int(batch), rate, decode(scenario, int(batch)).bound)
        for row in table["rates"]
        if (row["scheme"], row["gpus"], 1) == (scenario.scheme.name, scenario.tensor, scenario.pipeline)
        for batch, rate in row["tokens_per_second"].items()
    ]
