"""Fine-tuning one network: what is trained, the memory it takes, and the fewest GPUs for each ZeRO stage and offload"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self

from hunyuan_vllm.adapter import ATTENTION
from hunyuan_vllm.layout import expected_tensors
from hunyuan_vllm.network import Network
from hunyuan_vllm.plan.hardware import Gpu
from hunyuan_vllm.plan.scenario import Assumptions
from hunyuan_vllm.util.text import GIB

BF16, F32, INT64 = 2, 4, 8


@dataclass(frozen=True)
class TrainingAssumptions(Assumptions):
    logit_bytes: float = 14  # bfloat16, float32, log-probabilities, and their gradient
    fragmentation_efficiency: float = 0.95  # share of a GPU's memory that PyTorch's allocator can use
    bucket_gib: float = 0.5  # DeepSpeed's buckets for gradients and for parameters to come
    backward_copies: float = 2  # gradients of a layer's widest tensors that are alive at once
    host_used_gib: float = 60  # of a host: Python, CUDA and the data, of all its processes


Mode = Literal["full", "lora"]


@dataclass(frozen=True)
class Parameters:
    """Exact counts of a network's parameters, and bytes in the weights' types: bfloat16, and float32 for routers.

    Attributes:
        experts: of the largest layer's MLPs and router together: what ZeRO-3 gathers at once.
        largest: of the largest single tensor.
    """

    total: int
    trained: int
    nbytes: int
    gradient_bytes: int
    experts: int
    largest: int

    @classmethod
    def of(cls, config: Network, mode: Mode, rank: int, targets: tuple[str, ...]) -> Self:
        shapes = expected_tensors(config)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        total = sum(sizes.values())
        routers = sum(size for name, size in sizes.items() if name.endswith(".gate.wg.weight"))
        nbytes = BF16 * total + (F32 - BF16) * routers
        mlps = [0] * config.num_hidden_layers
        for name, size in sizes.items():
            if ".mlp." in name:
                mlps[int(name.split(".")[2])] += size
        largest = max(mlps), max(sizes.values())
        if mode == "full":
            return cls(total, total, nbytes, nbytes, *largest)
        ends = tuple(f".{target}.weight" for target in targets)
        adapters = rank * sum(sum(shape) for name, shape in shapes.items() if name.endswith(ends))
        return cls(total + adapters, adapters, nbytes + BF16 * adapters, BF16 * adapters, *largest)


Offload = Literal["none", "optimizer", "all"]


@dataclass(frozen=True)
class TrainingSetup:
    """A fine-tuning to plan.

    Attributes:
        rank, targets: of the adapters; modules by the end of their names.
        stage: of ZeRO: 0 nothing is divided among the GPUs, 1 the optimizer, 2 gradients too, 3 weights too.
        offload: what is in the hosts' memory: nothing, the optimizer (with gradients), or weights as well (stage 3).
        length: tokens of a GPU in an iteration.
        checkpointing: layers are computed again in the backward pass.
        host: bytes of a node's memory; None for no limit.
    """

    name: str
    config: Network
    gpu: Gpu
    gpus: int
    mode: Mode
    rank: int = 64
    targets: tuple[str, ...] = ATTENTION
    stage: int = 3
    offload: Offload = "none"
    length: int = 2048
    checkpointing: bool = True
    per_node: int = 8
    host: float | None = None
    assumptions: TrainingAssumptions = field(default_factory=TrainingAssumptions)

    def changed(self, **values: Any) -> Self:
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


def input_bytes(config: Network) -> int:
    """Ids, and the cosines and sines of their positions."""
    return INT64 + 2 * BF16 * config.head_dim


def layer_bytes(config: Network, layer: int) -> int:
    return _attention(config, layer) + _feed_forward(config, layer) + 2 * _norm(config.hidden_size)


def checkpoint_bytes(config: Network, layer: int) -> int:
    """Of one layer that is computed again: its input, and its own K and V, which it hands to the next one."""
    hands_on = not config.is_cross(layer) and layer + 1 < config.num_hidden_layers
    return BF16 * (config.hidden_size + (2 * config.num_key_value_heads * config.head_dim if hands_on else 0))


def head_bytes(config: Network, logit_bytes: float) -> float:
    """Of the final norm, the logits (so many bytes each) and the loss."""
    return _norm(config.hidden_size) + BF16 * config.hidden_size + logit_bytes * config.vocab_size


def widest_bytes(config: Network, layer: int) -> int:
    """Of the widest tensor in a layer: what a gradient in flight takes."""
    queries = config.num_attention_heads * config.head_dim
    width = config.intermediate_at(layer)
    shared = config.shared_width_at(layer)
    return max(F32 * config.hidden_size, BF16 * queries, BF16 * (width * config.topk_at(layer) + shared))


def _norm(size: int) -> int:
    """The float32 copy, its reciprocal root (4 bytes in all), and the normed value before the weight."""
    return F32 * size + F32 + BF16 * size


def _attention(config: Network, layer: int) -> int:
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    queries, kv = heads * head_dim, kv_heads * head_dim
    kept = BF16 * hidden  # the projections' input
    if config.use_qk_norm:
        kept += (heads + kv_heads) * _norm(head_dim)
    # Normed q and k, as attention reads them. Without norms a cross layer reads its owner's k, which is kept already.
    kept += BF16 * (queries + (kv if config.use_qk_norm or not config.is_cross(layer) else 0))
    kept += 0 if config.is_cross(layer) else BF16 * kv  # v, which cross layers read again
    return kept + BF16 * queries + F32 * heads  # attention's output and its log-sum-exp


def _feed_forward(config: Network, layer: int) -> int:
    hidden, width = config.hidden_size, config.intermediate_at(layer)
    experts, topk, shared = config.experts_at(layer), config.topk_at(layer), config.shared_width_at(layer)
    if experts == 1:
        return BF16 * hidden + _mlp(width)
    kept = F32 * (hidden + experts)  # the router's input and its probabilities
    if topk > 1:
        kept += F32 * (topk + 1)  # before they are divided by their sum, and the sum
    # Of each choice: the token, its way through the expert, the output in order; three indices and the weight.
    kept += topk * (2 * BF16 * hidden + _mlp(width) + 3 * INT64 + BF16)
    return kept + (BF16 * hidden + _mlp(shared) if shared else 0)


def _mlp(width: int) -> int:
    """gate's and up's outputs, silu of the first, and their product."""
    return 4 * BF16 * width


OPTIMIZER = 3 * F32  # a parameter: float32 copy and two moments
LIVE = 10**9  # parameters: `stage3_max_live_parameters` and sub_group_size of train/ds_zero3_*.json


@dataclass(frozen=True)
class Item:
    """A use of memory, in bytes; `exact` if it is a sum over parameters and nothing else."""

    name: str
    nbytes: float
    exact: bool = False
    note: str = ""


class TrainingMemory:
    """The memory of one GPU and of one node.

    Attributes:
        gpu_free: bytes of a GPU that are available to tensors.
    """

    def __init__(self, setup: TrainingSetup) -> None:
        self.setup = setup
        self.parameters = setup.parameters
        self.gpu = [item for item in self._gpu() if item.nbytes]
        self.host = [item for item in self._host() if item.nbytes]
        self.gpu_bytes = sum(item.nbytes for item in self.gpu)
        self.host_bytes = sum(item.nbytes for item in self.host)
        assumed = setup.assumptions
        self.gpu_free = (setup.gpu.memory - assumed.context_gib * GIB) * assumed.fragmentation_efficiency
        self.fits = self.gpu_bytes <= self.gpu_free and (setup.host is None or self.host_bytes <= setup.host)

    def _part(self, stage: int) -> int:
        """GPUs among which ZeRO divides what it divides from this stage on."""
        return self.setup.gpus if self.setup.stage >= stage else 1

    def _gpu(self) -> Iterator[Item]:
        setup, parameters, assumed = self.setup, self.parameters, self.setup.assumptions
        if setup.offload != "all":
            yield Item("weights", parameters.nbytes / self._part(3), True, "bfloat16, routers float32")
        if setup.offload == "none":
            yield Item("gradients", parameters.gradient_bytes / self._part(2), True, "of the same types")
            note = "float32 copy and Adam's moments"
            yield Item("optimizer", OPTIMIZER * parameters.trained / self._part(1), True, note)
            if setup.stage == 3:
                group = min(LIVE, parameters.trained / setup.gpus)
                yield Item("step", F32 * group, note="float32 gradients of a group of parameters")
        if setup.stage == 3:
            # A layer's experts, as with --make_moe_param_leaf_module.
            gathered = min(max(LIVE, parameters.experts), parameters.total)
            yield Item("gathered", BF16 * gathered, note="weights of a layer's experts, gathered while in use")
        if parameters.trained:
            largest = parameters.largest if setup.mode == "full" else 0
            yield Item("buckets", assumed.bucket_gib * GIB + BF16 * largest, note="gradients in transit")
        layers = range(setup.config.num_hidden_layers)
        of_layer = checkpoint_bytes if setup.checkpointing else layer_bytes
        kept = sum(of_layer(setup.config, layer) for layer in layers) + input_bytes(setup.config)
        yield Item("kept", setup.length * kept, note=f"for the backward pass, {setup.length:,} tokens")
        working = assumed.backward_copies * max(widest_bytes(setup.config, layer) for layer in layers)
        if setup.checkpointing:
            working += max(layer_bytes(setup.config, layer) for layer in layers)
        note = "recomputing one layer" if setup.checkpointing else "gradients in flight"
        yield Item("layer", setup.length * working, note=note)
        yield Item("head", setup.length * head_bytes(setup.config, assumed.logit_bytes), note="logits, loss")
        if setup.gpus > 1:
            nccl = assumed.nccl_gib + (assumed.nccl_network_gib if setup.nodes > 1 else 0)
            yield Item("NCCL", nccl * GIB, note="its buffers")
        yield Item("workspaces", assumed.workspace_gib * GIB)

    def _host(self) -> Iterator[Item]:
        setup, parameters, ranks = self.setup, self.parameters, min(self.setup.gpus, self.setup.per_node)
        if setup.offload == "all":
            yield Item("weights", parameters.nbytes * ranks / setup.gpus, True, "bfloat16")
        if setup.offload != "none":
            share = parameters.trained * ranks / self._part(1)
            yield Item("optimizer", OPTIMIZER * share, True, "float32 copy and Adam's moments")
            if setup.stage == 3:
                yield Item("gradients", (F32 + BF16) * share, True, "float32 for the step, bfloat16 as they come")
            else:
                yield Item("gradients", F32 * share, True, "float32, for the step")
        yield Item("processes", setup.assumptions.host_used_gib * GIB)


COUNTS = (1, 2, 4, 8, *range(16, 129, 8), *range(144, 257, 16), 320, 384, 448, 512, 768, 1024)
WAYS: tuple[tuple[int, Offload], ...] = (
    (0, "none"), (1, "none"), (2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"), (3, "all"),
)  # fmt: skip
"""ZeRO stages and offloads, the fastest first."""


def fewest(setup: TrainingSetup) -> TrainingSetup | None:
    """`setup` on the smallest number of GPUs that it fits on, up to 1,024."""
    tried = (setup.changed(gpus=gpus) for gpus in COUNTS)
    return next((one for one in tried if TrainingMemory(one).fits), None)


def fitting(setup: TrainingSetup, ways: tuple[tuple[int, Offload], ...] = WAYS) -> TrainingSetup | None:
    """`setup` in the first of `ways` that fits on its GPUs."""
    tried = (setup.changed(stage=stage, offload=offload) for stage, offload in ways)
    return next((one for one in tried if TrainingMemory(one).fits), None)
