"""Memory of a GPU: weights, activations, CUDA graphs, KV cache

Weights are exact: `tests/plan/` compares them with the real model class and with running engines.
"""

from collections import Counter
from dataclasses import dataclass

from hunyuan_vllm.network import Network
from hunyuan_vllm.plan.hardware import Gpu
from hunyuan_vllm.plan.model import layer_kinds, layer_matrices, padded_vocabulary, vectors
from hunyuan_vllm.plan.scenario import Scenario, Stage
from hunyuan_vllm.plan.schemes import BF16, FLOAT32, Scheme
from hunyuan_vllm.util.text import GIB

CACHE_SCALES = 4  # float32 scalars that vLLM's Attention keeps: of q, k, v and the probabilities


@dataclass(frozen=True)
class Weights:
    """Bytes on one rank.

    Attributes:
        parts: parameters by what they are for; their sum is `parameters`.
        buffers: the rotary table, folded norms and cache scales.
        padding: what CUDA kernels add when they pack weights.
    """

    parts: dict[str, int]
    buffers: int
    padding: int

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        return self.parameters + self.buffers + self.padding


def rank_weights(
    config: Network, scheme: Scheme, ranks: int, stage: Stage | None = None, gpu: Gpu | None = None, length: int = 0
) -> Weights:
    """Bytes on each of `ranks` tensor-parallel ranks of a stage (default: the whole network), on CPUs if no GPU is
    given; `length` is that of the longest sequence, 0 for the config's."""
    stage = stage or Stage(range(config.num_hidden_layers))
    parts: Counter[str] = Counter()
    padding = 0
    for layer, count in layer_kinds(config, stage.layers):
        for matrix in layer_matrices(config, layer, ranks):
            parts[matrix.part] += count * scheme.parameter_bytes(matrix, on_cpu=gpu is None)
            padding += count * scheme.padding(matrix, gpu) if gpu else 0
    parts["norms"] = BF16 * vectors(config) * len(stage.layers)
    table = BF16 * padded_vocabulary(config) // ranks * config.hidden_size
    if stage.first or (config.tie_word_embeddings and stage.last):
        parts["embedding"] = table
    if stage.last:
        parts["norms"] += BF16 * config.hidden_size
        if not config.tie_word_embeddings:
            parts["head"] = table
    return Weights(dict(parts), _buffers(config, len(stage.layers), length), padding)


def _buffers(config: Network, layers: int, length: int) -> int:
    folded = BF16 * config.head_dim if config.use_qk_norm else 0
    rope = config.rope_parameters
    positions = config.max_position_embeddings
    if rope["rope_type"] == "linear" or (rope["rope_type"] == "dynamic" and "alpha" not in rope):
        positions = int(positions * rope["factor"])
    else:
        positions = max(positions, length)
    return BF16 * positions * config.head_dim + layers * (folded + FLOAT32 * CACHE_SCALES)


def activation_peak(scenario: Scenario, stage: Stage) -> int:
    """Bytes of the largest moment of a step."""
    forward = forward_peak(scenario, stage, scenario.batched_tokens)
    if not stage.last:
        return forward
    hidden = BF16 * scenario.batched_tokens * scenario.config.hidden_size  # of all tokens, kept while sampling
    return max(forward, hidden + sampling_peak(scenario))


def sampling_peak(scenario: Scenario) -> int:
    """Bytes of the logits and what sampling makes of them, for as many sequences as may run."""
    rows = min(scenario.sequences, scenario.batched_tokens)
    vocabulary = padded_vocabulary(scenario.config)
    gathered = BF16 * rows * vocabulary // scenario.tensor if scenario.tensor > 1 else 0  # a rank's own part
    return int(scenario.assumptions.logit_bytes * rows * vocabulary) + gathered


def forward_peak(scenario: Scenario, stage: Stage, tokens: int) -> int:
    """Bytes of the largest moment of any layer: in attention, or in its experts or MLP."""
    return tokens * max(_layer_peak(scenario, layer) for layer, _ in layer_kinds(scenario.config, stage.layers))


def _layer_peak(scenario: Scenario, layer: int) -> int:
    """Bytes a token."""
    config, ranks = scenario.config, scenario.tensor
    hidden = config.hidden_size
    stream = 2 * BF16 * hidden  # residual and hidden states
    matrices = list(layer_matrices(config, layer, ranks))
    projected = matrices[0].outputs  # q, k and v
    attention = BF16 * (2 * projected + matrices[1].inputs + hidden)  # before and after RoPE and norms; output
    return stream + max(attention, _feed_forward(scenario, layer))


def _feed_forward(scenario: Scenario, layer: int) -> int:
    """Bytes a token. Experts have two workspaces, of which one becomes the output (fused_moe/experts/triton_moe.py)."""
    config = scenario.config
    hidden, experts = config.hidden_size, config.experts_at(layer)
    width = config.intermediate_at(layer) // scenario.tensor
    quantised = scenario.scheme.operands != "bf16"

    def mlp(size: int) -> int:
        rounded = hidden + size if quantised else 0
        return BF16 * (3 * size + hidden) + rounded

    if experts == 1:
        return mlp(width)
    topk = config.topk_at(layer)
    workspaces = BF16 * topk * (max(width, hidden) + max(2 * width, hidden))
    rounded = topk * max(width, hidden) if quantised else 0
    routed = FLOAT32 * experts + workspaces + rounded
    shared = config.shared_width_at(layer) // scenario.tensor
    return routed + (mlp(shared) if shared else 0)


def captured_sizes(scenario: Scenario) -> list[int]:
    """Batch sizes that vLLM captures a CUDA graph for, by default (`VllmConfig._set_cudagraph_sizes`)."""
    if scenario.eager:
        return []
    most = 1024 if scenario.gpu.capability[0] == 10 else 512
    largest = min(2 * scenario.sequences, most, scenario.batched_tokens)
    return [size for size in (1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)) if size <= largest]


def graph_memory(scenario: Scenario, stage: Stage) -> int:
    """Bytes of CUDA graphs: the largest one's tensors, which the others reuse, and each one's own records.

    Each size is captured twice: whole decode steps, and mixed steps between attention layers.
    """
    sizes = captured_sizes(scenario)
    if not sizes:
        return 0
    records = 2 * len(sizes) * len(stage.layers) * scenario.assumptions.graph_layer_kib * 1024
    return int(records) + forward_peak(scenario, stage, sizes[-1])


@dataclass(frozen=True)
class Budget:
    """Bytes on each GPU of one pipeline stage.

    Attributes:
        taken: vLLM's share of it.
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
        blocks: KV blocks that every rank has: as many as the rank with the least memory.
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
    config, scheme, assumed = scenario.config, scenario.scheme, scenario.assumptions
    outside = assumed.context_gib + (assumed.nccl_gib if scenario.ranks > 1 else 0)
    outside += assumed.nccl_network_gib if scenario.nodes > 1 else 0
    return [
        Budget(
            stage=stage,
            total=scenario.gpu.memory,
            taken=int(scenario.gpu.memory * scenario.utilization),
            weights=rank_weights(config, scheme, scenario.tensor, stage, scenario.gpu, scenario.max_model_len),
            activations=activation_peak(scenario, stage),
            graphs=graph_memory(scenario, stage),
            workspace=int(assumed.workspace_gib * GIB),
            outside=int(outside * GIB),
        )
        for stage in scenario.stages
    ]


def capacity(scenario: Scenario, rank_budgets: list[Budget], sharing: bool = True) -> Capacity:
    """What the cache holds, with CLA's one cache a group or (not `sharing`) one for each layer."""
    shapes = [scenario.cache_shape(budget.stage, sharing) for budget in rank_budgets]
    held = zip(shapes, rank_budgets, strict=True)
    blocks = min(shape.blocks(max(0, budget.cache), scenario.block_size) for shape, budget in held)
    return Capacity(blocks, scenario.block_size * scenario.dcp, max(shape.bytes_per_token for shape in shapes))
