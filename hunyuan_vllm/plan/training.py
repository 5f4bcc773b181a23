"""Memory and time of fine-tuning, and which set-ups fit"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.plan.model import open_planned
from hunyuan_vllm.plan.plan import SHAPE
from hunyuan_vllm.plan.training_setup import Mode, Offload, Parameters, TrainingSetup

BF16, F32, INT64 = 2, 4, 8


def input_bytes(config: HunYuanConfig) -> int:
    """Ids, and the cosines and sines of their positions."""
    return INT64 + 2 * BF16 * config.head_dim


def layer_bytes(config: HunYuanConfig, layer: int) -> int:
    """Of one layer, all its intermediate tensors."""
    return _attention(config, layer) + _feed_forward(config, layer) + 2 * _norm(config.hidden_size)


def checkpoint_bytes(config: HunYuanConfig, layer: int) -> int:
    """Of one layer that is computed again: its input, and its own K and V, which it hands to the next one."""
    hands_on = not config.is_cross(layer) and layer + 1 < config.num_hidden_layers
    return BF16 * (config.hidden_size + (2 * config.num_key_value_heads * config.head_dim if hands_on else 0))


def head_bytes(config: HunYuanConfig, logit_bytes: float) -> float:
    """Of the final norm, the logits (so many bytes each) and the loss."""
    return _norm(config.hidden_size) + BF16 * config.hidden_size + logit_bytes * config.vocab_size


def widest_bytes(config: HunYuanConfig, layer: int) -> int:
    """Of the widest tensor in a layer: what a gradient in flight takes."""
    queries = config.num_attention_heads * config.head_dim
    width = config.intermediate_at(layer)
    shared = width * config.shared_experts_at(layer)
    return max(F32 * config.hidden_size, BF16 * queries, BF16 * (width * config.topk_at(layer) + shared))


def _norm(size: int) -> int:
    """The float32 copy, its reciprocal root (4 bytes in all), and the normed value before the weight."""
    return F32 * size + F32 + BF16 * size


def _heads_norm(heads: int, head_dim: int) -> int:
    return heads * _norm(head_dim)


def _attention(config: HunYuanConfig, layer: int) -> int:
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    queries, kv = heads * head_dim, kv_heads * head_dim
    kept = BF16 * hidden  # the projections' input
    if config.use_qk_norm:
        kept += _heads_norm(heads, head_dim) + _heads_norm(kv_heads, head_dim)
    # Normed q and k, as attention reads them. Without norms a cross layer reads its owner's k, which is kept already.
    kept += BF16 * (queries + (kv if config.use_qk_norm or not config.is_cross(layer) else 0))
    kept += 0 if config.is_cross(layer) else BF16 * kv  # v, which cross layers read again
    return kept + BF16 * queries + F32 * heads  # attention's output and its log-sum-exp


def _feed_forward(config: HunYuanConfig, layer: int) -> int:
    hidden, width = config.hidden_size, config.intermediate_at(layer)
    experts, topk, shared = config.experts_at(layer), config.topk_at(layer), config.shared_experts_at(layer)
    if experts == 1:
        return BF16 * hidden + _mlp(width)
    kept = F32 * (hidden + experts)  # the router's input and its probabilities
    if topk > 1:
        kept += F32 * (topk + 1)  # before they are divided by their sum, and the sum
    # Of each choice: the token, its way through the expert, the output in order; three indices and the weight.
    kept += topk * (2 * BF16 * hidden + _mlp(width) + 3 * INT64 + BF16)
    return kept + (BF16 * hidden + _mlp(width * shared) if shared else 0)


def _mlp(width: int) -> int:
    """gate's and up's outputs, silu of the first, and their product."""
    return 4 * BF16 * width


GIB = 2**30
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
        gpu: what is on each GPU.
        host: what is in a node's memory.
    """

    def __init__(self, setup: TrainingSetup) -> None:
        self.setup = setup
        self.parameters = setup.parameters
        self.gpu = [item for item in self._gpu() if item.nbytes]
        self.host = [item for item in self._host() if item.nbytes]

    @property
    def gpu_bytes(self) -> float:
        return sum(item.nbytes for item in self.gpu)

    @property
    def gpu_room(self) -> float:
        """Bytes of a GPU that tensors can have."""
        assumed = self.setup.assumptions
        return (self.setup.gpu.memory - assumed.context_gib * GIB) * assumed.fragmentation_efficiency

    @property
    def host_bytes(self) -> float:
        return sum(item.nbytes for item in self.host)

    @property
    def fits(self) -> bool:
        return self.gpu_bytes <= self.gpu_room and (self.setup.host is None or self.host_bytes <= self.setup.host)

    def _part(self, stage: int) -> int:
        """Among how many GPUs what this stage of ZeRO divides is divided."""
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
            gathered = max(LIVE, parameters.experts if setup.leaves else parameters.largest)
            gathered = min(gathered, parameters.total)
            note = "weights of a layer's experts" if setup.leaves else "weights of some modules"
            yield Item("gathered", BF16 * gathered, note=f"{note}, whole while they are used")
        if parameters.trained:
            largest = parameters.largest if setup.mode == "full" else 0
            yield Item("buckets", assumed.bucket_gib * GIB + BF16 * largest, note="gradients on their way")
        yield Item("kept", self._kept(), note=f"for the backward pass, {setup.tokens:,} tokens")
        yield Item(
            "layer", self._working(), note="of one layer at work" if setup.checkpointing else "gradients at work"
        )
        yield Item("head", setup.tokens * head_bytes(setup.config, assumed.logit_bytes), note="logits, loss")
        yield Item("NCCL", self._nccl(), note="its buffers")
        yield Item("workspaces", assumed.workspace_gib * GIB)

    def _kept(self) -> float:
        config = self.setup.config
        of_layer = checkpoint_bytes if self.setup.checkpointing else layer_bytes
        each = sum(of_layer(config, layer) for layer in range(config.num_hidden_layers))
        return self.setup.tokens * (each + input_bytes(config))

    def _working(self) -> float:
        config = self.setup.config
        layers = range(config.num_hidden_layers)
        gradients = self.setup.assumptions.backward_copies * max(widest_bytes(config, n) for n in layers)
        again = max(layer_bytes(config, n) for n in layers) if self.setup.checkpointing else 0
        return self.setup.tokens * (gradients + again)

    def _nccl(self) -> float:
        if self.setup.gpus == 1:
            return 0
        assumed = self.setup.assumptions
        return (assumed.nccl_gib + (assumed.nccl_network_gib if self.setup.nodes > 1 else 0)) * GIB

    def _host(self) -> Iterator[Item]:
        setup, parameters, ranks = self.setup, self.parameters, self.setup.gpus_of_a_node
        if setup.offload == "all":
            yield Item("weights", parameters.nbytes * ranks / setup.gpus, True, "bfloat16")
        if setup.offload != "none":
            share = parameters.trained * ranks / self._part(1)
            yield Item("optimizer", OPTIMIZER * share, True, "float32 copy and Adam's moments")
            if setup.stage == 3:
                yield Item("gradients", (F32 + BF16) * share, True, "float32 for the step, bfloat16 as they come")
            else:
                yield Item("gradients", F32 * share, True, "float32, for the step")
        yield Item("programs", setup.assumptions.host_used_gib * GIB)


STEP_BYTES = 30  # a parameter: gradient, copy and moments are read, copy, moments and the bfloat16 weight written
FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = 2, 2, 2  # operations a weight and token


@dataclass(frozen=True)
class Iteration:
    """Seconds of each kind of work in one iteration.

    Attributes:
        compute: products, at the rate that large ones reach.
        gather: weights, from the other GPUs.
        reduce: gradients, to the GPUs that own them.
        host: weights and gradients between GPUs and their hosts.
        step: the optimizer.
    """

    compute: float
    gather: float
    reduce: float
    host: float
    step: float
    operations: float
    tokens: int

    @property
    def overlapped(self) -> float:
        """Seconds if all transfers hide behind products, or these behind them."""
        return max(self.compute, self.gather + self.reduce, self.host) + self.step

    @property
    def one_by_one(self) -> float:
        """Seconds if nothing overlaps."""
        return self.compute + self.gather + self.reduce + self.host + self.step

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Of all GPUs: at least, at most."""
        return self.tokens / self.one_by_one, self.tokens / self.overlapped


def iteration(setup: TrainingSetup) -> Iteration:
    """The iteration of a set-up, whether or not it fits."""
    parameters, assumed = setup.parameters, setup.assumptions
    operations = _operations(setup, parameters)
    rate = (setup.gpu.bf16_tflops or 0) * 1e12 * assumed.compute_efficiency
    gathers = assumed.gathers + setup.checkpointing if setup.stage == 3 else 0
    # What is not gathered in stages 1 and 2 is the updated part of the weights, once.
    sent = 1 if setup.stage in (1, 2) else gathers
    whole = parameters.nbytes if setup.stage == 3 else parameters.gradient_bytes
    reduced = (2 if setup.stage == 0 else 1) * parameters.gradient_bytes
    return Iteration(
        compute=operations / rate if rate else float("inf"),
        gather=sent * _spread_seconds(setup, whole),
        reduce=_spread_seconds(setup, reduced),
        host=_host_seconds(setup, parameters, gathers),
        step=_step_seconds(setup, parameters),
        operations=operations,
        tokens=setup.tokens * setup.gpus,
    )


def _operations(setup: TrainingSetup, parameters: Parameters) -> float:
    """Of one GPU in an iteration."""
    config, tokens = setup.config, setup.tokens
    passes = FORWARD * (2 if setup.checkpointing else 1) + BACKWARD_INPUT
    # q·k and p·v, over half of the positions on average; twice as much backward.
    attention = FORWARD * config.num_hidden_layers * config.num_attention_heads * config.head_dim * setup.length
    products = passes * parameters.active + BACKWARD_WEIGHT * parameters.trained_active
    return tokens * (products + attention * (passes / FORWARD + 1))


def _spread_seconds(setup: TrainingSetup, nbytes: float) -> float:
    """A ring all-gather, or reduce-scatter, of `nbytes` over all GPUs: within each node, and between nodes on all of a
    node's network cards at once. The two run at the same time; the slower one counts."""
    if setup.gpus == 1:
        return 0.0
    local, efficiency = setup.gpus_of_a_node, setup.assumptions.link_efficiency
    within = (local - 1) / local * nbytes / (setup.gpu.link_one_way * efficiency)
    between = (setup.nodes - 1) / setup.nodes * nbytes / local / (setup.node_link * efficiency)
    return max(within, between)


def _host_seconds(setup: TrainingSetup, parameters: Parameters, gathers: float) -> float:
    """Of one GPU's link to its host."""
    moved = 0.0
    if setup.offload == "all":
        moved += gathers * parameters.nbytes / setup.gpus
    if setup.offload != "none":
        share = setup.gpus if setup.stage >= 1 else 1
        moved += parameters.gradient_bytes / share  # down
        if setup.offload == "optimizer":
            moved += parameters.gradient_bytes / share  # updated weights up
    return moved / (setup.assumptions.pcie_gbs * 1e9)


def _step_seconds(setup: TrainingSetup, parameters: Parameters) -> float:
    assumed = setup.assumptions
    share = parameters.trained / (setup.gpus if setup.stage >= 1 else 1)
    if setup.offload == "none":
        return STEP_BYTES * share / (setup.gpu.bandwidth * assumed.memory_efficiency)
    return STEP_BYTES * share * setup.gpus_of_a_node / (assumed.host_gbs * 1e9)


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


MINIMA: Final[dict[Mode, int]] = {"full": 32, "lora": 8}
"""GPUs that fine-tuning was said to take, all weights with ZeRO-3 and offload."""
SECONDS: Final = 35
"""About so many an iteration at batch 1, of which GPUs and length of sequences were not said."""


def against_published(setup: TrainingSetup) -> list[str]:
    """Sentences for a set-up of the published network; none for another."""
    network = open_planned("hunyuan-large").config
    if any(getattr(network, name) != getattr(setup.config, name) for name in SHAPE):
        return []
    return list(_sentences(setup.changed(stage=3, offload="all")))


def _sentences(setup: TrainingSetup) -> Iterator[str]:
    published = MINIMA[setup.mode]
    what = "all weights (ZeRO-3 and offload)" if setup.mode == "full" else "LoRA"
    there = TrainingMemory(setup.changed(gpus=published))
    found = fewest(setup)
    agrees = "as here"
    if found is None or found.gpus > published:
        agrees = f"here {found.gpus if found else 'more than 1,024'}"
    elif found.gpus < published:
        slow, quick = (iteration(one).one_by_one for one in (found, setup.changed(gpus=published)))
        agrees = f"here {found.gpus} would do, in {slow:,.0f} s an iteration instead of {quick:,.0f}"
    yield (
        f"published: at least {published} GPUs for {what}; {agrees}, with everything offloaded. "
        f"On {published}, a GPU holds {there.gpu_bytes / GIB:,.0f} GiB and a host {there.host_bytes / GIB:,.0f} GiB"
        + (f" of {setup.host / GIB:,.0f}" if setup.host else "")
    )
    fewer = [count for count in COUNTS if count < published and count % setup.per_node == 0]
    if fewer:
        less = TrainingMemory(setup.changed(gpus=fewer[-1]))
        yield f"on {fewer[-1]} a host would hold {less.host_bytes / GIB:,.0f} GiB: hosts set the minimum, not GPUs"
    if not (kept := TrainingMemory(setup.changed(gpus=published, offload="none"))).fits:
        weights = next(item.nbytes for item in kept.gpu if item.name == "weights")
        yield (
            f"without offload {published} are not enough: a GPU would hold {kept.gpu_bytes / GIB:,.0f} GiB, "
            f"{weights / GIB:,.1f} of them weights, and has room for {kept.gpu_room / GIB:,.0f}"
        )
    if setup.mode == "full":
        took = iteration(setup.changed(gpus=published, batch=1))
        near = took.overlapped <= SECONDS <= 1.1 * took.one_by_one
        yield (
            f"published: about {SECONDS} s an iteration at batch 1; here, at {setup.length:,} tokens on {published} "
            f"{setup.gpu.name}, {took.overlapped:,.0f} s if transfers hide behind products and "
            f"{took.one_by_one:,.0f} s if nothing overlaps"
            + (
                ": it is what one gets where little does"
                if near
                else ": these GPUs or this length are not what it was for"
            )
        )
