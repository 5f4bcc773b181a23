"""Seconds of a training iteration, and the fewest GPUs for each ZeRO stage and offload"""

from dataclasses import dataclass

from hunyuan_vllm.plan.training import Offload, Parameters, TrainingMemory, TrainingSetup

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
        """Seconds if transfers and products overlap completely."""
        return max(self.compute, self.gather + self.reduce, self.host) + self.step

    @property
    def sequential(self) -> float:
        """Seconds if nothing overlaps."""
        return self.compute + self.gather + self.reduce + self.host + self.step

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Of all GPUs: minimum and maximum."""
        return self.tokens / self.sequential, self.tokens / self.overlapped


def iteration(setup: TrainingSetup) -> Iteration:
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
"""ZeRO stages and offloads, the fastest first."""


@dataclass(frozen=True)
class Choice:
    """A ZeRO stage and offload on the fewest GPUs that it fits on; `setup` is None where it needs more than 1,024."""

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
    """`setup` on the smallest number of GPUs that it fits on."""
    tried = (setup.changed(gpus=gpus) for gpus in COUNTS)
    return next((one for one in tried if TrainingMemory(one).fits), None)


def fitting(setup: TrainingSetup, ways: tuple[tuple[int, Offload], ...] = WAYS) -> TrainingSetup | None:
    """`setup` in the first of `ways` that fits on its GPUs."""
    tried = (setup.changed(stage=stage, offload=offload) for stage, offload in ways)
    return next((one for one in tried if TrainingMemory(one).fits), None)


def choices(setup: TrainingSetup) -> list[Choice]:
    """One for each way."""
    return [Choice(stage, offload, fewest(setup.changed(stage=stage, offload=offload))) for stage, offload in WAYS]
