"""What to change: cheapest first, and every offer holds when it is taken up word by word."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scenarios import network, planned
from typer.testing import CliRunner

from hunyuan_vllm.cli import app
from hunyuan_vllm.layout import tensor_parallel_sizes
from hunyuan_vllm.plan.advice import arrangements, remedies
from hunyuan_vllm.plan.fit import check_fit

SHORT_BY = {
    "too few GPUs": "--gpu H100 --gpus 8 --tp 8",
    "a little": "--gpu H20 --gpus 8 --tp 8 --gpu-memory-utilization 0.96",
    "the cache": "--gpu H100 --gpus 16 --tp 16 --gpu-memory-utilization 0.62",
    "kernels": "--gpu A100 --gpus 8 --tp 8 --kv fp8",
    "a size that does not divide": "--gpu H100 --gpus 12 --tp 12",
    "length": "--gpu H20 --gpus 16 --tp 16 --max-model-len 262144",
    "everything": "--gpu V100 --gpus 2 --tp 2 --scheme int8-w8a8",
}


def run(command: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["plan", *command.split(), "--json"])
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.parametrize("command", SHORT_BY.values(), ids=SHORT_BY)
def test_every_remedy_fits_when_it_is_given_as_flags(command: str) -> None:
    code, plan = run(command)
    assert code == 1 and not plan["fits"] and 0 < len(plan["remedies"]) <= 6
    for remedy in plan["remedies"][:3]:
        code, changed = run(f"{command} {remedy['flags']}")
        assert (code, changed["fits"]) == (0, True), remedy["flags"]
        assert changed["kv_cache"]["tokens"] == remedy["tokens"] >= remedy["max_model_len"]


def test_cheapest_first() -> None:
    """A cache that is a little short: memory in reserve before fewer sequences, these before rounding, GPUs last."""
    found = remedies(check_fit(planned("H100", utilization=0.62)))
    costs = [sum(change.cost for change in remedy.changes) for remedy in found]
    assert costs == sorted(costs)
    assert found[0].flags == "--gpu-memory-utilization 0.95"
    assert len({remedy.kinds for remedy in found}) == len(found)


def test_no_change_is_offered_that_is_not_needed() -> None:
    found = remedies(check_fit(planned("H100", utilization=0.62)))
    for remedy in found:
        assert not any(other.kinds < remedy.kinds for other in found)


def test_a_quantised_checkpoint_keeps_its_scheme() -> None:
    found = remedies(check_fit(planned("L40S", gpus=8, tensor=8, scheme="fp8", quantised=True)))
    assert found and not any("--scheme" in remedy.flags for remedy in found)


def test_shorter_sequences_use_what_there_is() -> None:
    fit = check_fit(planned("H100", utilization=0.62))
    (shorter,) = [remedy for remedy in remedies(fit, limit=20) if remedy.kinds == {"length"}]
    assert shorter.fit.scenario.max_model_len == fit.shared.tokens // 1024 * 1024


def test_no_length_is_offered_that_is_too_short_for_the_requests() -> None:
    long = check_fit(planned("H100", utilization=0.62, input_len=100_000))
    assert not any("length" in remedy.kinds for remedy in remedies(long, limit=20))


def test_arrangements() -> None:
    assert tensor_parallel_sizes(network()) == [1, 2, 4, 8, 16]
    assert arrangements(network(), 16) == [(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)]
    assert arrangements(network(), 24) == [(8, 3), (4, 6), (2, 12), (1, 24)]
    assert arrangements(network(), 64)[-1] == (2, 32)  # 64 stages would cut groups of two layers
