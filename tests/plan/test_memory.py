"""The budget of a GPU: vLLM's division of it, and what the rest holds."""

from __future__ import annotations

import re

import pytest
from scenarios import planned

from hunyuan_vllm.plan.fit import check_fit
from hunyuan_vllm.plan.memory import (
    Capacity,
    activation_peak,
    budgets,
    capacity,
    captured_sizes,
    forward_peak,
    graph_memory,
    sampling_peak,
)
from hunyuan_vllm.plan.scenario import GIB, Stage


def test_vllms_share_is_divided_without_rest() -> None:
    (budget,) = budgets(planned())
    parts = (budget.weights.total, budget.activations, budget.graphs, budget.workspace, budget.cache)
    assert sum(parts) == budget.taken == int(0.92 * int(95 * GIB))


def test_tokens_of_the_published_model() -> None:
    """10 KiB a token on a rank of 8 or 16 with CLA, 20 without; blocks of 16 tokens, one of them vLLM's own."""
    scenario = planned()
    (budget,) = found = budgets(scenario)
    shared, unshared = capacity(scenario, found), capacity(scenario, found, sharing=False)
    assert shared.blocks == budget.cache // (10 * 1024 * 16)
    assert unshared.blocks == budget.cache // (20 * 1024 * 16)
    assert shared.tokens == 16 * (shared.blocks - 1)
    assert capacity(planned(kv="fp8"), found).blocks == budget.cache // (5 * 1024 * 16)
    spread = capacity(planned(dcp=2), found)
    assert (spread.blocks, spread.tokens) == (shared.blocks, 2 * shared.tokens)


def test_sequences_take_whole_blocks() -> None:
    held = Capacity(blocks=11, block_size=16, bytes_per_token=1)
    assert [held.sequences(length) for length in (1, 16, 17, 80, 81, 160, 161)] == [10, 10, 5, 2, 1, 1, 0]


def test_the_poorest_stage_decides() -> None:
    scenario = planned(tensor=8, pipeline=2)
    found = budgets(scenario)
    assert found[1].cache != found[0].cache  # the last stage samples
    poorest = min(budget.cache for budget in found)
    assert capacity(scenario, found).blocks == poorest // (5 * 1024 * 16)


def test_sampling_peak_by_hand() -> None:
    """1024 sequences of 129,024 logits: 14 bytes each as assumed, and this rank's part in BF16."""
    assert sampling_peak(planned(tensor=8)) == 1024 * 129024 * 14 + 2 * 1024 * 129024 // 8
    assert sampling_peak(planned(tensor=1, sequences=64)) == 64 * 129024 * 14


def test_forward_peak_by_hand() -> None:
    """A token at 8 ranks: residual and hidden states, two expert workspaces of 6400, router logits, and the shared
    MLP's gate and up, their product, and its output. At one rank the workspaces are as wide as gate and up."""
    width = 18304 // 8
    a_token = 2 * 2 * 6400 + 2 * (6400 + 6400) + 4 * 16 + 2 * (3 * width + 6400)
    assert forward_peak(planned(tensor=8), Stage(range(64)), 100) == 100 * a_token
    whole = 2 * 2 * 6400 + 2 * (18304 + 2 * 18304) + 4 * 16 + 2 * (3 * 18304 + 6400)
    assert forward_peak(planned(tensor=1), Stage(range(64)), 1) == whole


def test_only_the_last_stage_samples() -> None:
    scenario = planned(tensor=8, pipeline=2)
    first, last = scenario.stages
    assert activation_peak(scenario, first) == forward_peak(scenario, first, 8192) < activation_peak(scenario, last)


def test_graphs() -> None:
    assert captured_sizes(planned())[:6] == [1, 2, 4, 8, 16, 24] and captured_sizes(planned())[-2:] == [496, 512]
    assert captured_sizes(planned(sequences=64))[-1] == 128
    assert captured_sizes(planned("B200"))[-1] == 1024
    assert graph_memory(planned(eager=True), planned().stages[0]) == 0


def test_what_must_fit_beside_vllms_share() -> None:
    """0.6 GiB of CUDA's and 1.6 of NCCL's over two nodes; 2% of 95 GiB is less."""
    assert check_fit(planned()).fits
    assert check_fit(planned(utilization=0.98)).reasons == [
        "CUDA and NCCL hold 2.2 GiB before vLLM takes its share, and --gpu-memory-utilization 0.98 leaves 1.9 GiB: use "
        "at most 0.97"
    ]
    assert check_fit(planned(utilization=0.97)).fits


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (dict(gpus=8, tensor=8), r"the weights take 90.5 GiB per GPU, and vLLM may use 87.4 GiB"),
        (
            dict(gpus=8, tensor=8, utilization=0.96),
            r"weights, activations and CUDA graphs take 93.4 GiB .* nothing is left",
        ),
        (dict(gpu="H100", utilization=0.62), r"the KV cache holds \d+,\d+ tokens, and one sequence may have 131,072"),
    ],
)
def test_why_it_does_not_fit(values: dict, reason: str) -> None:
    fit = check_fit(planned(**values))
    assert not fit.fits
    (found,) = fit.reasons
    assert re.search(reason, found)


def test_more_memory_never_holds_less() -> None:
    shares = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    tokens = [check_fit(planned(utilization=share)).shared.tokens for share in shares]
    assert tokens == sorted(tokens) and tokens[0] == 0 < tokens[-1]
