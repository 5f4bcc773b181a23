"""Tokens per second: the roofline of a step, collectives, and rates by batch size"""

from dataclasses import dataclass

from hunyuan_vllm.plan.model import layer_kinds, layer_matrices, open_planned, padded_vocabulary
from hunyuan_vllm.plan.scenario import Scenario, Stage
from hunyuan_vllm.plan.schemes import BF16


def all_reduce_bytes(scenario: Scenario, tokens: int) -> int:
    """Bytes of the message: a hidden state a token."""
    return BF16 * tokens * scenario.config.hidden_size if scenario.tensor > 1 else 0


def collective_seconds(scenario: Scenario, tokens: int) -> float:
    """Seconds a layer spends in collectives: two all-reduces, and with context parallelism a gather of queries and a
    scatter of outputs."""
    if scenario.tensor == 1:
        return 0.0
    assumed, nodes = scenario.assumptions, scenario.tensor_nodes
    local = -(-scenario.tensor // nodes)
    message = all_reduce_bytes(scenario, tokens)
    seconds = assumed.all_reduce_us * 1e-6
    if local > 1:
        seconds += 2 * (local - 1) / local * message / (scenario.gpu.link_one_way * assumed.link_efficiency)
    if nodes > 1:
        seconds += assumed.network_us * 1e-6
        seconds += 2 * (nodes - 1) / nodes * message / local / (scenario.node_link * assumed.link_efficiency)
    return (4 if scenario.dcp > 1 else 2) * seconds


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


def expected_experts(experts: int, topk: int, tokens: int) -> float:
    """Distinct experts that `tokens` tokens are expected to reach: E·(1 − (1 − k/E)ⁿ).

    Routing is taken to be uniform, and tokens to be independent; where texts have favourites it is fewer.
    """
    return experts * (1 - (1 - topk / experts) ** tokens)


@dataclass(frozen=True)
class Step:
    """One step of one rank.

    Attributes:
        operations: multiplications and additions, of the matrices and of attention.
        all_reduce_bytes: the message of one all-reduce.
        memory_seconds, compute_seconds: at the datasheet's rates.
        work_seconds: the longer of the two at the assumed efficiencies.
        collective_seconds, overhead_seconds: beside it, as assumed.
    """

    tokens: int
    weight_bytes: float
    cache_bytes: float
    operations: float
    all_reduce_bytes: int
    memory_seconds: float
    compute_seconds: float
    work_seconds: float
    collective_seconds: float
    overhead_seconds: float

    @property
    def bound(self) -> float:
        """Seconds that no implementation can go below on this GPU."""
        return max(self.memory_seconds, self.compute_seconds)

    @property
    def estimate(self) -> float:
        """Seconds, all assumed losses included."""
        return self.work_seconds + self.collective_seconds + self.overhead_seconds

    @property
    def limited_by(self) -> str:
        """What takes most of the estimated step."""
        work = "memory" if self.memory_seconds >= self.compute_seconds else "compute"
        shares = {work: self.work_seconds, "links": self.collective_seconds, "overhead": self.overhead_seconds}
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
    for layer, count in layer_kinds(config, stage.layers):
        hit = expected_experts(config.experts_at(layer), config.topk_at(layer), tokens)
        for matrix in layer_matrices(config, layer, scenario.tensor):
            routed = matrix.part == "experts"
            weight_bytes += count * scheme.parameter_bytes(matrix) * (hit / matrix.copies if routed else 1)
            rows = count * tokens * (config.topk_at(layer) if routed else 1)
            products[matrix.quantised] += 2 * rows * matrix.outputs * matrix.inputs
    if stage.last:
        head = padded_vocabulary(config) // scenario.tensor * config.hidden_size
        weight_bytes += BF16 * head
        products[False] += 2 * sequences * head
    # Every layer reads, also those that share a cache; a rank reads its part of the tokens.
    cache_bytes = sequences * context * scenario.cache_shape(stage, sharing=False).bytes_per_token / scenario.dcp
    heads = config.num_attention_heads / scenario.tensor
    attention = 4 * heads * config.head_dim * tokens * context * len(stage.layers)
    bf16 = 1e12 * (scenario.gpu.bf16_tflops or 0)
    # Backends may round queries too, and multiply in FP8, where the cache is FP8.
    fp8 = 1e12 * (scenario.gpu.fp8_tflops or 0)
    attention_rate = fp8 if scenario.kv == "fp8" and fp8 else bf16
    memory = (weight_bytes + cache_bytes) / scenario.gpu.bandwidth
    compute = products[True] / scheme.rate(scenario.gpu) + products[False] / bf16 + attention / attention_rate
    assumed = scenario.assumptions
    layer_us = assumed.eager_layer_overhead_us if scenario.eager else assumed.layer_overhead_us
    return Step(
        tokens=tokens,
        weight_bytes=weight_bytes,
        cache_bytes=cache_bytes,
        operations=products[True] + products[False] + attention,
        all_reduce_bytes=all_reduce_bytes(scenario, tokens),
        memory_seconds=memory,
        compute_seconds=compute,
        work_seconds=max(memory / assumed.memory_efficiency, compute / assumed.compute_efficiency),
        collective_seconds=len(stage.layers) * collective_seconds(scenario, tokens),
        overhead_seconds=1e-6 * layer_us * len(stage.layers)
        + stage_hop_seconds(scenario, tokens)
        + (1e-3 * assumed.step_overhead_ms if stage.last else 0),
    )


# The least share of the bound that the published rates reached, from a batch on: `tests/plan/test_roofline.py`.
PUBLISHED_SHARES = {1: 0.032, 4: 0.065}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Decode:
    """Decoding with so many sequences in flight on all engines together.

    Attributes:
        batch: sequences of one engine.
        step: the slowest stage's step; of `batch` sequences divided among the stages.
        bound, estimate: tokens a second, of all engines; the estimate was not validated on GPUs.
        per_sequence: tokens a second that one user sees, estimated.
    """

    batch: int
    step: Step
    bound: float
    estimate: float
    per_sequence: float

    @property
    def low(self) -> float:
        """The low end of what to expect: the share of the bound that the only published rates reached."""
        share = max(share for batch, share in PUBLISHED_SHARES.items() if batch <= self.batch)
        return min(self.estimate, share * self.bound)


@dataclass(frozen=True)
class Prefill:
    """Reading one prompt.

    Attributes:
        step: one rank's work on it, of the slowest stage.
        bound, estimate: tokens a second, of all engines.
        first_token: seconds to the first token of an idle server, estimated.
    """

    step: Step
    bound: float
    estimate: float
    first_token: float


def decode(scenario: Scenario, batch: int) -> Decode:
    """Rates at `batch` sequences an engine, each with the input and half of the output behind it.

    With pipeline stages vLLM keeps as many groups of sequences in flight as there are stages, so that each works; a
    token takes a round of all stages, and in a round every sequence gets one.
    """
    context = scenario.input_len + scenario.output_len / 2
    group = -(-batch // scenario.pipeline)
    steps = [stage_step(scenario, stage, group, context) for stage in scenario.stages]
    slowest = max(steps, key=lambda step: step.estimate)
    estimate = batch / _round(scenario, batch, [step.estimate for step in steps])
    bound = batch / _round(scenario, batch, [step.bound for step in steps])
    return Decode(batch, slowest, scenario.replicas * bound, scenario.replicas * estimate, estimate / batch)


def _round(scenario: Scenario, batch: int, seconds: list[float]) -> float:
    """Seconds until every sequence has a token: all stages in turn, or the slowest as often as there are groups."""
    groups = min(batch, scenario.pipeline)
    return max(sum(seconds), groups * max(seconds))


def prefill(scenario: Scenario) -> Prefill:
    """Rates of reading the scenario's prompts, one after the other.

    A prompt longer than a step's tokens goes in pieces; attention's work is that of its mean context.
    """
    tokens = min(scenario.input_len, scenario.batched_tokens)
    pieces = scenario.input_len / tokens
    steps = [stage_step(scenario, stage, tokens, scenario.input_len / 2, sequences=1) for stage in scenario.stages]
    slowest = max(steps, key=lambda step: step.estimate)
    bound = tokens / max(step.bound for step in steps)
    first = sum(step.estimate for step in steps) + (pieces - 1) * slowest.estimate
    return Prefill(slowest, scenario.replicas * bound, scenario.replicas * tokens / slowest.estimate, first)


# Tokens a second of Hunyuan-Large on H20 with 2048 tokens in: (scheme, GPUs) → batch → rate.
PUBLISHED_RATES = {
    ("bf16", 16): {1: 20.2, 4: 75.5},
    ("int8", 8): {1: 19.3, 4: 73.6},
    ("fp8", 8): {1: 19.8, 4: 74.9},
}
SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_experts", "num_attention_heads")


@dataclass(frozen=True)
class PublishedRate:
    """Tokens a second that were published, and the bound of the same set-up."""

    batch: int
    rate: float
    bound: float

    @property
    def share(self) -> float:
        """Part of the bound that was reached."""
        return self.rate / self.bound


def published_rates(scenario: Scenario) -> list[PublishedRate]:
    """For a scenario that is one of the published set-ups (network, scheme, GPUs that share each layer); else none."""
    large = open_planned("hunyuan-large").config
    same_network = all(getattr(large, name) == getattr(scenario.config, name) for name in SHAPE)
    if not same_network or (scenario.gpu.name, scenario.input_len, scenario.pipeline) != ("H20", 2048, 1):
        return []
    rates = PUBLISHED_RATES.get((scenario.scheme.name, scenario.tensor), {})
    return [PublishedRate(batch, rate, decode(scenario, batch).bound) for batch, rate in rates.items()]
