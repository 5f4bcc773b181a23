"""Peak of a step's temporary tensors on one rank: the largest moment of a forward pass, or of sampling.

vLLM measures this by running one step of `max_num_batched_tokens` tokens and one sampling of `max_num_seqs` logits.
The moments below are those of its GPU path; the allocator's rounding is in `Assumptions.workspace_gib`.
"""

from __future__ import annotations

from hunyuan_vllm.plan.network import layer_matrices, padded_vocabulary
from hunyuan_vllm.plan.scenario import Scenario
from hunyuan_vllm.plan.weights import Stage

__all__ = ["activation_peak", "captured_sizes", "forward_peak", "graph_memory", "sampling_peak"]

BF16, FLOAT32, KIB = 2, 4, 1024


def activation_peak(scenario: Scenario, stage: Stage) -> int:
    """Bytes."""
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
    return tokens * max(_layer_peak(scenario, layer) for layer, _ in scenario.network.kinds(stage.layers))


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
    shared = config.shared_experts_at(layer)
    return routed + (mlp(width * shared) if shared else 0)


def captured_sizes(scenario: Scenario) -> list[int]:
    """Batch sizes that vLLM captures a CUDA graph for, by default (`VllmConfig._set_cudagraph_sizes`)."""
    if scenario.eager:
        return []
    most = 1024 if scenario.gpu.capability[0] == 10 else 512
    largest = min(2 * scenario.sequences, most, scenario.batched_tokens)
    return [size for size in (1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)) if size <= largest]


def graph_memory(scenario: Scenario, stage: Stage) -> int:
    """Bytes of CUDA graphs: the largest one's tensors, which the others reuse, and each one's own records.

    Every size is captured twice, for decode steps whole and for mixed steps between attention layers.
    """
    sizes = captured_sizes(scenario)
    if not sizes:
        return 0
    records = 2 * len(sizes) * len(stage.layers) * scenario.assumptions.graph_layer_kib * KIB
    return int(records) + forward_peak(scenario, stage, sizes[-1])
