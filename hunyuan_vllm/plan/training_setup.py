"""What is asked of the training planner: one network, trained in one way, on so many GPUs"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import expected_tensors
from hunyuan_vllm.plan.hardware import Gpu
from hunyuan_vllm.plan.scenario import Assumptions


def _assumed(value: float, meaning: str) -> float:
    return field(default=value, metadata={"meaning": meaning})


@dataclass(frozen=True)
class TrainingAssumptions(Assumptions):
    """`--assume name=value` replaces one. None of these numbers was measured on the GPUs that are planned for."""

    logit_bytes: float = _assumed(14, "bytes a logit: bfloat16, float32, log-probabilities, and their gradient")
    fragmentation_efficiency: float = _assumed(0.95, "share of a GPU's memory that PyTorch's allocator can hand out")
    bucket_gib: float = _assumed(0.5, "GiB a GPU: DeepSpeed's buckets for gradients and for parameters to come")
    backward_copies: float = _assumed(2, "gradients of a layer's widest tensors that are alive at once, in copies")
    gathers: float = _assumed(
        2, "times ZeRO-3 gathers all weights in an iteration; once more with checkpointing, whose second forward "
        "pass releases a layer before its backward pass (a layer is larger than stage3_max_reuse_distance)"
    )  # fmt: skip
    pcie_gbs: float = _assumed(25, "GB/s between a GPU and its host, each way")
    host_gbs: float = _assumed(250, "GB/s of a host's memory that the optimizer's step on its CPUs reaches")
    host_used_gib: float = _assumed(60, "GiB a host: Python, CUDA and the data, of all its processes")


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
