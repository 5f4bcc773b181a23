"""The roofline: bytes and operations against the checkpoint's own tensors; the published rates against the bound."""

from __future__ import annotations

import random
from math import prod
from statistics import mean

import pytest
from checkpoints import tiny_config
from scenarios import planned, published

from hunyuan_vllm.layout import expected_tensors
from hunyuan_vllm.plan.scenario import Assumptions, Scenario
from hunyuan_vllm.plan.speed import (
    PUBLISHED_SHARES,
    all_reduce_bytes,
    collective_seconds,
    decode,
    expected_experts,
    prefill,
    published_rates,
    stage_step,
)


def active_elements() -> int:
    """Elements of the matrices that one token passes through: all but 15 of 16 experts; the tied table as the head."""
    tensors = expected_tensors(published())
    return sum(
        prod(shape)
        for name, shape in tensors.items()
        if len(shape) == 2 and (".experts." not in name or ".experts.0." in name)
    )


def whole(scenario: Scenario):
    return scenario.stages[0]


@pytest.mark.parametrize(("experts", "topk", "tokens"), [(16, 1, 4), (16, 1, 40), (8, 2, 3), (4, 4, 1)])
def test_expected_experts_are_what_dice_show(experts: int, topk: int, tokens: int) -> None:
    dice = random.Random(0)
    rounds = [len({expert for _ in range(tokens) for expert in dice.sample(range(experts), topk)}) for _ in range(5000)]
    assert expected_experts(experts, topk, tokens) == pytest.approx(mean(rounds), abs=0.1)


def test_a_token_reads_the_active_parameters_once() -> None:
    """51.3B of them: in BF16 over 8 ranks, the router's twice as wide and on every rank."""
    routers = 64 * 16 * 6400
    step = stage_step(planned(gpus=8, tensor=8), whole(planned(tensor=8)), tokens=1, context=0)
    assert round(active_elements() / 1e9, 1) == 51.3
    assert step.weight_bytes == (2 * (active_elements() - routers)) / 8 + 4 * routers
    assert step.operations == 2 * (active_elements() - routers) / 8 + 2 * routers


def test_every_layer_reads_the_cache_though_half_of_them_keep_one() -> None:
    """Sharing halves what is kept, not what is read: 160 KiB a token in all."""
    scenario = planned(gpus=8, tensor=8)
    read = stage_step(scenario, whole(scenario), tokens=3, context=1000).cache_bytes
    assert read == 3 * 1000 * 160 * 1024 / 8
    for values, share in ((dict(kv="fp8"), 1 / 2), (dict(tensor=16, gpus=16), 1), (dict(tensor=16, dcp=2), 1 / 2)):
        changed = planned(**{"gpus": 16, "tensor": 8, **values})
        assert stage_step(changed, whole(changed), tokens=3, context=1000).cache_bytes == share * read


def test_attention_operations() -> None:
    """QK and PV: 4 · heads · head_dim operations for each token and each token it sees."""
    scenario = planned(gpus=8, tensor=8)
    near, far = (stage_step(scenario, whole(scenario), 1, context).operations for context in (0, 1000))
    assert far - near == 64 * 1000 * 4 * 10 * 80


def test_published_rates_lie_at_3_to_8_percent_of_the_bound() -> None:
    shares = {}
    for scheme, gpus, kv in (("bf16", 16, "auto"), ("int8", 8, "auto"), ("fp8", 8, "fp8")):
        for rate in published_rates(planned(gpus=gpus, tensor=gpus, scheme=scheme, kv=kv)):
            shares[scheme, rate.batch] = round(100 * rate.share, 1)
    assert shares == {
        ("bf16", 1): 3.3,
        ("bf16", 4): 6.6,
        ("int8", 1): 3.2,
        ("int8", 4): 6.5,
        ("fp8", 1): 3.3,
        ("fp8", 4): 6.6,
    }
    for batch, least in PUBLISHED_SHARES.items():
        assert min(share for (_, at), share in shares.items() if at == batch) == 100 * least


def test_an_estimate_is_a_range_from_the_share_that_was_published() -> None:
    for scheme, gpus in (("bf16", 16), ("int8", 8), ("fp8", 8)):
        scenario = planned(gpus=gpus, tensor=gpus, scheme=scheme)
        for rate in published_rates(scenario):
            expected = decode(scenario, rate.batch)
            assert 0.95 * rate.rate <= expected.low <= 1.05 * rate.rate
            assert expected.low < expected.estimate < expected.bound


def test_an_fp8_cache_is_bound_by_the_rate_of_fp8() -> None:
    """Backends round queries too, and multiply in FP8: long contexts then cost half the operations' time."""
    scenarios = [planned(gpus=8, tensor=8, scheme="fp8", kv=kv) for kv in ("fp8", "auto")]
    fp8, auto = (stage_step(one, whole(one), 2048, 1_000_000, sequences=1).compute_seconds for one in scenarios)
    assert 0.5 < fp8 / auto < 0.55


def test_no_published_rates_for_another_set_up() -> None:
    for values in (
        dict(gpu="H100"),
        dict(gpus=8, tensor=8),
        dict(tensor=8, pipeline=2),
        dict(input_len=512),
        dict(config=tiny_config()),
    ):
        assert published_rates(planned(**values)) == []


def test_an_estimate_is_below_its_bound() -> None:
    for gpu in ("H20", "H100", "L40S", "A100", "B200"):
        for batch in (1, 16, 256):
            for values in (dict(tensor=16), dict(tensor=8, pipeline=2), dict(tensor=4, pipeline=4)):
                rates = decode(planned(gpu, **values), batch)
                assert 0 < rates.estimate < rates.bound
        reading = prefill(planned(gpu))
        assert 0 < reading.estimate < reading.bound


def test_bounds_are_the_datasheets() -> None:
    """A long prompt on one H20 is bound by 148 TFLOPS, a token by 4 TB/s."""
    scenario = planned(gpus=1, tensor=1, scheme="bf16")
    step = prefill(scenario.changed(input_len=8192)).step
    assert step.bound == step.compute_seconds == pytest.approx(step.operations / 148e12)
    one = decode(scenario, 1).step
    assert one.bound == one.memory_seconds == (one.weight_bytes + one.cache_bytes) / 4e12
    fp8, int8 = (prefill(planned(scheme=scheme, input_len=8192)) for scheme in ("fp8", "int8"))
    assert fp8.bound > 1.8 * int8.bound


def test_without_losses_the_estimate_is_the_bound() -> None:
    perfect = Assumptions(memory_efficiency=1, compute_efficiency=1, layer_overhead_us=0, step_overhead_ms=0)
    rates = decode(planned(gpus=1, tensor=1, assumptions=perfect), 8)
    assert rates.estimate == pytest.approx(rates.bound)


def test_stages_take_turns() -> None:
    """One sequence is in one stage at a time; with as many as stages all work, at the pace of the last, which has the
    head too."""
    alone, together = (decode(planned(tensor=8, pipeline=2), batch) for batch in (1, 2))
    assert together.bound == pytest.approx(2 * alone.bound, rel=0.02)


def test_replicas_add_up() -> None:
    two, one = decode(planned(gpus=16, tensor=8), 8), decode(planned(gpus=8, tensor=8), 8)
    assert (two.estimate, two.bound, two.per_sequence) == (2 * one.estimate, 2 * one.bound, 2 * one.per_sequence / 2)


def test_collectives_by_hand() -> None:
    """Two all-reduces a layer. Within a node each rank sends 7/4 of the message; between two nodes, an eighth of it."""
    assert all_reduce_bytes(planned(), 10) == 10 * 6400 * 2
    message = 1000 * 6400 * 2
    within = 10e-6 + 7 / 4 * message / (450e9 * 0.7)
    assert collective_seconds(planned(tensor=8), 1000) == pytest.approx(2 * within)
    across = within + 25e-6 + message / 8 / (50e9 * 0.7)
    assert collective_seconds(planned(tensor=16), 1000) == pytest.approx(2 * across)
    assert collective_seconds(planned(tensor=16, dcp=2), 1000) == pytest.approx(4 * across)
    assert collective_seconds(planned(tensor=1), 1000) == 0
