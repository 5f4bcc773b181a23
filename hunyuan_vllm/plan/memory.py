"""Where a GPU's memory goes, as vLLM divides it, and how many tokens of context the rest holds.

vLLM takes `utilization` of the whole; what weights, activations and CUDA graphs leave of it becomes KV cache. CUDA's
context and NCCL's buffers exist before it measures, so they must fit into what it does not take.
"""

from __future__ import annotations

from dataclasses import dataclass

from hunyuan_vllm.cache_shape import CacheShape
from hunyuan_vllm.plan.activations import activation_peak, graph_memory
from hunyuan_vllm.plan.scenario import GIB, Scenario
from hunyuan_vllm.plan.weights import Stage, Weights, rank_weights

__all__ = ["Budget", "Capacity", "budgets", "capacity"]


@dataclass(frozen=True)
class Budget:
    """Bytes on each GPU of one pipeline stage.

    Attributes:
        total: the GPU's memory.
        taken: vLLM's share of it.
        weights: exact.
        activations, graphs, workspace: see `activations.py`, `Assumptions`.
        outside: context and NCCL buffers.
    """

    stage: Stage
    total: int
    taken: int
    weights: Weights
    activations: int
    graphs: int
    workspace: int
    outside: int

    @property
    def cache(self) -> int:
        """What is left for the KV cache; negative where the rest does not fit."""
        return self.taken - self.weights.total - self.activations - self.graphs - self.workspace

    @property
    def starts(self) -> bool:
        """Whether vLLM finds its share free when it starts."""
        return self.outside <= self.total - self.taken


@dataclass(frozen=True)
class Capacity:
    """What the KV cache of one engine holds.

    Attributes:
        blocks: KV blocks that every rank has: as many as the poorest.
        block_size: tokens of a block, over the ranks that share it.
        bytes_per_token: bytes on one rank of the stage with most layers that keep a cache.
    """

    blocks: int
    block_size: int
    bytes_per_token: int

    @property
    def tokens(self) -> int:
        """Tokens of context. One block is vLLM's own, for positions that hold nothing."""
        return max(0, self.blocks - 1) * self.block_size

    def sequences(self, length: int) -> int:
        """Sequences of `length` tokens that fit at once; each takes whole blocks."""
        return max(0, self.blocks - 1) // -(-length // self.block_size)


def budgets(scenario: Scenario) -> list[Budget]:
    """One for each pipeline stage."""
    return [_budget(scenario, stage) for stage in scenario.stages]


def _budget(scenario: Scenario, stage: Stage) -> Budget:
    assumed = scenario.assumptions
    outside = assumed.context_gib + (assumed.nccl_gib if scenario.ranks > 1 else 0)
    outside += assumed.nccl_network_gib if scenario.nodes > 1 else 0
    return Budget(
        stage=stage,
        total=scenario.gpu.memory,
        taken=int(scenario.gpu.memory * scenario.utilization),
        weights=rank_weights(scenario.network, scenario.scheme, scenario.tensor, stage, scenario.gpu),
        activations=activation_peak(scenario, stage),
        graphs=graph_memory(scenario, stage),
        workspace=int(assumed.workspace_gib * GIB),
        outside=int(outside * GIB),
    )


def capacity(scenario: Scenario, rank_budgets: list[Budget], sharing: bool = True) -> Capacity:
    """What the cache holds, with CLA's one cache a group or (not `sharing`) one for each layer."""
    shapes = [
        CacheShape.of(
            scenario.config,
            tensor_parallel=scenario.tensor,
            stage=budget.stage.layers,
            itemsize=scenario.kv_itemsize,
            sharing=sharing,
            dcp=scenario.dcp,
        )
        for budget in rank_budgets
    ]
    blocks = min(
        shape.blocks(max(0, budget.cache), scenario.block_size)
        for shape, budget in zip(shapes, rank_budgets, strict=True)
    )
    return Capacity(blocks, scenario.block_size * scenario.dcp, max(shape.bytes_per_token for shape in shapes))
