"""Which set-ups fit: the fewest GPUs for each way to divide and offload, and the quickest way on given GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hunyuan_vllm.plan.training.memory import TrainingMemory
from hunyuan_vllm.plan.training.setup import Offload, TrainingSetup
from hunyuan_vllm.plan.training.time import Iteration, iteration

__all__ = ["COUNTS", "WAYS", "Choice", "choices", "fewest", "fitting"]

COUNTS = (1, 2, 4, 8, *range(16, 129, 8), *range(144, 257, 16), 320, 384, 448, 512, 768, 1024)
WAYS: tuple[tuple[int, Offload], ...] = (
    (0, "none"), (1, "none"), (2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"), (3, "all"),
)  # fmt: skip
"""ZeRO stages and offloads that DeepSpeed has and that train/ds_*.json use or imply, the quickest first."""


@dataclass(frozen=True)
class Choice:
    """A way to train, on the fewest GPUs that it fits on; None where it fits on none up to 1,024."""

    stage: int
    offload: Offload
    setup: TrainingSetup | None

    @property
    def memory(self) -> TrainingMemory:
        assert self.setup is not None
        return TrainingMemory(self.setup)

    @property
    def iteration(self) -> Iteration:
        assert self.setup is not None
        return iteration(self.setup)


def fewest(setup: TrainingSetup) -> TrainingSetup | None:
    """`setup` on the first number of GPUs that will do."""
    tried = (setup.changed(gpus=gpus) for gpus in COUNTS)
    return next((one for one in tried if TrainingMemory(one).fits), None)


def fitting(setup: TrainingSetup, ways: tuple[tuple[int, Offload], ...] = WAYS) -> TrainingSetup | None:
    """`setup` in the first of `ways` that fits on its GPUs."""
    tried = (setup.changed(stage=stage, offload=offload) for stage, offload in ways)
    return next((one for one in tried if TrainingMemory(one).fits), None)


def choices(setup: TrainingSetup) -> Iterator[Choice]:
    """Each way, on the fewest GPUs it fits on."""
    for stage, offload in WAYS:
        yield Choice(stage, offload, fewest(setup.changed(stage=stage, offload=offload)))
