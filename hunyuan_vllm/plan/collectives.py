"""Time of the collectives of one layer: an all-reduce after attention and one after the experts or MLP.

Ring all-reduce: each rank sends 2·(n−1)/n of the message. Across nodes it is taken in two levels: within each node,
and between nodes on the share that each GPU holds, through its own network card.
"""

from __future__ import annotations

from hunyuan_vllm.plan.scenario import Scenario

__all__ = ["all_reduce_bytes", "collective_seconds", "stage_hop_seconds"]

BF16 = 2


def all_reduce_bytes(scenario: Scenario, tokens: int) -> int:
    """Bytes of the message: a hidden state a token."""
    return BF16 * tokens * scenario.config.hidden_size if scenario.tensor > 1 else 0


def _count(scenario: Scenario) -> int:
    """A layer's collectives; context parallelism gathers queries and scatters outputs beside the all-reduces."""
    return 0 if scenario.tensor == 1 else 2 + (2 if scenario.dcp > 1 else 0)


def collective_seconds(scenario: Scenario, tokens: int) -> float:
    """Seconds a layer spends in them."""
    assumed = scenario.assumptions
    nodes = scenario.tensor_nodes
    local = -(-scenario.tensor // nodes)
    message = all_reduce_bytes(scenario, tokens)
    seconds = assumed.all_reduce_us * 1e-6
    if local > 1:
        seconds += 2 * (local - 1) / local * message / (scenario.gpu.link_one_way * assumed.link_efficiency)
    if nodes > 1:
        seconds += assumed.network_us * 1e-6
        seconds += 2 * (nodes - 1) / nodes * message / local / (scenario.node_link * assumed.link_efficiency)
    return _count(scenario) * seconds


def stage_hop_seconds(scenario: Scenario, tokens: int) -> float:
    """Seconds from one pipeline stage to the next: hidden states and residual, cut over the tensor-parallel ranks."""
    if scenario.pipeline == 1:
        return 0.0
    assumed = scenario.assumptions
    crosses = scenario.nodes > 1
    rate = scenario.node_link if crosses else scenario.gpu.link_one_way
    message = 2 * BF16 * tokens * scenario.config.hidden_size / scenario.tensor
    latency = (assumed.all_reduce_us + (assumed.network_us if crosses else 0)) * 1e-6
    return latency + message / (rate * assumed.link_efficiency)
