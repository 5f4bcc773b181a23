"""What is asked of the training planner: one network, trained in one way, on so many GPUs of one kind."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.plan.gpus import Gpu
from hunyuan_vllm.plan.training.assumptions import TrainingAssumptions
from hunyuan_vllm.plan.training.parameters import Mode, Parameters

__all__ = ["ATTENTION", "Mode", "Offload", "TrainingSetup"]

Offload = Literal["none", "optimizer", "all"]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class TrainingSetup:
    """A set-up to judge.

    Attributes:
        mode: all weights, or low-rank adapters.
        rank, targets: of the adapters; modules by the end of their names.
        stage: of ZeRO: 0 nothing is divided among the GPUs, 1 the optimizer, 2 gradients too, 3 weights too.
        offload: what is in the hosts' memory: nothing, the optimizer (with gradients), or weights as well (stage 3).
        length: tokens of a sequence.
        batch: sequences of a GPU in an iteration.
        checkpointing: layers are computed again in the backward pass.
        leaves: ZeRO-3 gathers all experts of a layer at once (--make_moe_param_leaf_module).
        per_node: GPUs of a node.
        node_link: bytes a second that each GPU can send to another node.
        host: bytes of a node's memory; None for as much as it takes.
    """

    name: str
    config: HunYuanConfig
    gpu: Gpu
    gpus: int
    mode: Mode
    rank: int = 64
    targets: tuple[str, ...] = ATTENTION
    stage: int = 3
    offload: Offload = "none"
    length: int = 2048
    batch: int = 1
    checkpointing: bool = True
    leaves: bool = True
    per_node: int = 8
    node_link: float = 400e9 / 8
    host: float | None = None
    assumptions: TrainingAssumptions = field(default_factory=TrainingAssumptions)

    def changed(self, **values: Any) -> TrainingSetup:
        other = replace(self, **values)
        if not values.keys() & {"config", "mode", "rank", "targets"}:
            other.__dict__["parameters"] = self.parameters  # counting thousands of tensors takes a while
        return other

    @cached_property
    def parameters(self) -> Parameters:
        return Parameters.of(self.config, self.mode, self.rank, self.targets)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)

    @property
    def gpus_of_a_node(self) -> int:
        return min(self.gpus, self.per_node)

    @property
    def tokens(self) -> int:
        """Of a GPU in an iteration."""
        return self.length * self.batch
