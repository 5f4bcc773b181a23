"""How fast a step can be: what it must read and multiply, against what the GPU can; and an estimate below that bound.

A step's bound is the longer of reading (weights once, the cache of every sequence) and multiplying, at the datasheet's
rates. The estimate divides by the assumed efficiencies and adds collectives and overheads (`assumptions.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from hunyuan_vllm.cache_shape import CacheShape
from hunyuan_vllm.plan.collectives import all_reduce_bytes, collective_seconds, stage_hop_seconds
from hunyuan_vllm.plan.network import layer_matrices, padded_vocabulary
from hunyuan_vllm.plan.scenario import Scenario
from hunyuan_vllm.plan.weights import Stage

__all__ = ["Step", "expected_experts", "stage_step"]

BF16 = 2


def expected_experts(experts: int, topk: int, tokens: int) -> float:
    """Distinct experts that `tokens` tokens are expected to reach: E·(1 − (1 − k/E)ⁿ).

    Routing is taken to be uniform, and tokens to be independent; where texts have favourites it is fewer.
    """
    return experts * (1 - (1 - topk / experts) ** tokens)


@dataclass(frozen=True)
class Step:
    """One step of one rank, in bytes, operations and seconds.

    Attributes:
        tokens: tokens in the step.
        experts: distinct experts a layer reads, on average over the layers that have any.
        weight_bytes, cache_bytes: what is read.
        operations: multiplications and additions, of the matrices and of attention.
        reduced_bytes: the message of one all-reduce.
        memory, compute: seconds at the datasheet's rates.
        work: seconds of the longer of the two at the assumed efficiencies.
        collectives, overhead: seconds beside it, as assumed.
    """

    tokens: int
    experts: float
    weight_bytes: float
    cache_bytes: float
    operations: float
    reduced_bytes: int
    memory: float
    compute: float
    work: float
    collectives: float
    overhead: float

    @property
    def bound(self) -> float:
        """Seconds that no implementation can go below on this GPU."""
        return max(self.memory, self.compute)

    @property
    def estimate(self) -> float:
        """Seconds, all assumed losses included."""
        return self.work + self.collectives + self.overhead

    @property
    def limited_by(self) -> str:
        """What takes most of the estimated step."""
        work = "memory" if self.memory >= self.compute else "compute"
        shares = {work: self.work, "links": self.collectives, "overhead": self.overhead}
        return max(shares, key=lambda share: shares[share])


def stage_step(scenario: Scenario, stage: Stage, tokens: int, context: float, sequences: int | None = None) -> Step:
    """A step of `tokens` tokens that attend to `context` tokens each, on one rank of a stage.

    Args:
        sequences: sequences the tokens belong to, each of which reads its cache once and has one row of logits;
            default: one a token, as in decoding.
    """
    sequences = tokens if sequences is None else sequences
    config, scheme = scenario.config, scenario.scheme
    weight_bytes = 0.0
    products: dict[bool, float] = {False: 0.0, True: 0.0}  # by whether the scheme quantises
    reached = mixed = 0.0
    for layer, count in scenario.network.kinds(stage.layers):
        hit = expected_experts(config.experts_at(layer), config.topk_at(layer), tokens)
        if config.experts_at(layer) > 1:
            reached, mixed = reached + count * hit, mixed + count
        for matrix in layer_matrices(config, layer, scenario.tensor):
            routed = matrix.part == "experts"
            weight_bytes += count * scheme.parameter_bytes(matrix) * (hit / matrix.copies if routed else 1)
            rows = count * tokens * (config.topk_at(layer) if routed else 1)
            products[matrix.quantised] += 2 * rows * matrix.outputs * matrix.inputs
    if stage.last:
        head = padded_vocabulary(config) // scenario.tensor * config.hidden_size
        weight_bytes += BF16 * head
        products[False] += 2 * sequences * head
    cache_bytes = sequences * context * _cache_bytes_per_token(scenario, stage)
    heads = config.num_attention_heads / scenario.tensor
    attention = 4 * heads * config.head_dim * tokens * context * len(stage.layers)
    bf16 = 1e12 * (scenario.gpu.bf16_tflops or 0)
    # Backends may round queries too, and multiply in FP8, where the cache is FP8.
    fp8 = 1e12 * (scenario.gpu.fp8_tflops or 0)
    attention_rate = fp8 if scenario.kv == "fp8" and fp8 else bf16
    memory = (weight_bytes + cache_bytes) / scenario.gpu.bandwidth
    compute = products[True] / scheme.rate(scenario.gpu) + products[False] / bf16 + attention / attention_rate
    assumed = scenario.assumptions
    return Step(
        tokens=tokens,
        experts=reached / mixed if mixed else 0.0,
        weight_bytes=weight_bytes,
        cache_bytes=cache_bytes,
        operations=products[True] + products[False] + attention,
        reduced_bytes=all_reduce_bytes(scenario, tokens),
        memory=memory,
        compute=compute,
        work=max(memory / assumed.memory_efficiency, compute / assumed.compute_efficiency),
        collectives=len(stage.layers) * collective_seconds(scenario, tokens),
        overhead=_overhead(scenario, stage, tokens),
    )


def _cache_bytes_per_token(scenario: Scenario, stage: Stage) -> float:
    """Bytes of K and V that a rank reads for a token of context. Every layer reads, also those that share a cache."""
    shape = CacheShape.of(
        scenario.config,
        tensor_parallel=scenario.tensor,
        stage=stage.layers,
        itemsize=scenario.kv_itemsize,
        sharing=False,
    )
    return shape.bytes_per_token / scenario.dcp


def _overhead(scenario: Scenario, stage: Stage, tokens: int) -> float:
    assumed = scenario.assumptions
    layer_us = assumed.eager_layer_overhead_us if scenario.eager else assumed.layer_overhead_us
    seconds = 1e-6 * layer_us * len(stage.layers) + stage_hop_seconds(scenario, tokens)
    return seconds + (1e-3 * assumed.step_overhead_ms if stage.last else 0)
