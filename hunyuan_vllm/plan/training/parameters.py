"""Parameters by what training does with them: all, those that are trained, those that a token is multiplied with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import expected_tensors

__all__ = ["Mode", "Parameters"]

Mode = Literal["full", "lora"]


@dataclass(frozen=True)
class Parameters:
    """Exact counts.

    Attributes:
        narrow, wide: of the network, in bfloat16 and in float32 (routers).
        trained_narrow, trained_wide: those with a gradient.
        experts: of the largest layer's MLPs and router together: what one leaf of ZeRO-3 holds.
        largest: of the largest single tensor.
        active: weights that a token is multiplied with, the head included.
        trained_active: those among them that have a gradient.
    """

    narrow: int
    wide: int
    trained_narrow: int
    trained_wide: int
    experts: int
    largest: int
    active: int
    trained_active: int

    @property
    def total(self) -> int:
        return self.narrow + self.wide

    @property
    def trained(self) -> int:
        return self.trained_narrow + self.trained_wide

    @property
    def nbytes(self) -> int:
        return 2 * self.narrow + 4 * self.wide

    @property
    def gradient_bytes(self) -> int:
        """In the weights' own types."""
        return 2 * self.trained_narrow + 4 * self.trained_wide

    @classmethod
    def of(cls, config: HunYuanConfig, mode: Mode, rank: int, targets: tuple[str, ...]) -> Parameters:
        shapes = expected_tensors(config)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        wide = sum(size for name, size in sizes.items() if _is_router(name))
        narrow = sum(sizes.values()) - wide
        head = config.vocab_size * config.hidden_size
        active = head + round(sum(size * _share(name, config) for name, size in sizes.items()))
        leaves = [0] * config.num_hidden_layers
        for name, size in sizes.items():
            if ".mlp." in name:
                leaves[_layer(name)] += size
        trained, trained_wide, trained_active = narrow, wide, active
        if mode == "lora":
            adapted = [name for name in shapes if name.endswith(tuple(f".{target}.weight" for target in targets))]
            added = {name: rank * sum(shapes[name]) for name in adapted}
            trained, trained_wide = sum(added.values()), 0
            trained_active = round(sum(size * _share(name, config) for name, size in added.items()))
            narrow, active = narrow + trained, active + trained_active
        return cls(narrow, wide, trained, trained_wide, max(leaves), max(sizes.values()), active, trained_active)


def _is_router(name: str) -> bool:
    return name.endswith(".gate.wg.weight")


def _layer(name: str) -> int:
    return int(name.split(".")[2])


def _share(name: str, config: HunYuanConfig) -> float:
    """Part of the tokens that a layer's weight is multiplied with."""
    if not name.startswith("model.layers.") or name.endswith("norm.weight"):
        return 0.0
    layer = _layer(name)
    return config.topk_at(layer) / config.experts_at(layer) if ".experts." in name else 1.0
