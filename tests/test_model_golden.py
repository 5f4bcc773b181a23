"""The engine against the original model code's recorded log-probabilities, in every mode this machine runs."""

from itertools import chain
from statistics import fmean

import pytest
from engine import MIB, TRACED, counter, engine, greatest_difference, mean_difference, score
from golden_data import FLOAT32_TOLERANCE, GOLDEN_NAMES, load_golden

from hunyuan_vllm.cpu_attention import DecodeAttentionImpl
from hunyuan_vllm.cpu_kernels import ATTENTION, Kernel, kernel
from hunyuan_vllm.quant.schemes import BF16

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def check(name: str, **options) -> None:
    golden = load_golden(name)
    with engine(golden.path, **options) as llm:
        results = score(llm, [item.prompt for item in golden.items], max_tokens=24)
    assert greatest_difference(results, golden) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_float32(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_bfloat16(name: str) -> None:
    """What is decoded agrees with what is read, which is another kernel's work on most CPUs."""
    golden = load_golden(name)
    prompts = [item.prompt for item in golden.items]
    with engine(golden.path, dtype="bfloat16") as llm:
        results = score(llm, prompts)
        decoded = score(llm, prompts, max_tokens=24, prompt_logprobs=False)
        read = score(llm, [prompt + result.tokens for prompt, result in zip(prompts, decoded, strict=True)])
        impls = llm.apply_model(lambda model: [layer.self_attn.attn.impl for layer in model.model.layers])[0]
    assert mean_difference(results, golden) <= golden.bfloat16_tolerance
    pairs = [zip(a.logprobs, b.prompt_logprobs[-24:], strict=True) for a, b in zip(decoded, read, strict=True)]
    assert fmean(abs(a - b) for a, b in chain.from_iterable(pairs)) <= golden.bfloat16_tolerance
    assert all(isinstance(impl, DecodeAttentionImpl) == (kernel(BF16, ATTENTION) is Kernel.OURS) for impl in impls)


@pytest.mark.parametrize("name", ["cla2_dense", "v1_a13b"])
def test_bfloat16_in_two_ranks(name: str) -> None:
    golden = load_golden(name)
    with engine(golden.path, dtype="bfloat16", tensor_parallel_size=2) as llm:
        results = score(llm, [item.prompt for item in golden.items])
    assert mean_difference(results, golden) <= golden.bfloat16_tolerance


def test_compiled() -> None:
    check("cla4_top1", enforce_eager=False)


@pytest.mark.parametrize("name", ["cla2_top1", "v1_a13b"])
def test_traced(name: str) -> None:
    check(name, **TRACED)


@pytest.mark.parametrize("name", ["cla2_top1", "cla4_top1"])
def test_without_sharing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUNYUAN_VLLM_CLA_SHARING", "0")
    check(name)


@pytest.mark.parametrize("name", ["cla2_top1", "v1_7b"])
def test_chunked_prefill_prefix_caching_and_preemption(name: str) -> None:
    """One engine, three pressures: 48 tokens a step, prompts met again, and a cache too small for all at once."""
    golden = load_golden(name)
    prompts = [item.prompt for item in golden.items]
    block_bytes = 32 * 1024  # 32 tokens of 1 KiB, with two layers that keep K and V
    with engine(
        golden.path,
        block_size=32,
        max_num_batched_tokens=48,
        max_num_seqs=16,
        max_model_len=192,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=14 * block_bytes,
    ) as llm:
        chunked = score(llm, prompts, max_tokens=24)
        assert greatest_difference(chunked, golden) <= FLOAT32_TOLERANCE

        for prompt, item in zip(prompts, golden.items, strict=True):
            if len(prompt) < 64:
                continue
            score(llm, [prompt], prompt_logprobs=False)
            (again,) = score(llm, [prompt], max_tokens=24, prompt_logprobs=False)
            assert again.cached_tokens >= 32
            assert again.tokens == item.greedy
            assert max(abs(a - b) for a, b in zip(again.logprobs, item.greedy_logprobs, strict=True)) <= 2e-4

        before = counter(llm, "vllm:num_preemptions")
        crowd = score(llm, prompts * 2, max_tokens=24, prompt_logprobs=False)
        assert counter(llm, "vllm:num_preemptions") > before
        for half in (crowd[: len(prompts)], crowd[len(prompts) :]):
            assert greatest_difference(half, golden) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(("name", "size"), [("cla2_top1", 2), ("cla2_top1", 4), ("v1_a13b", 2), ("v1_moe_tf", 4)])
def test_tensor_parallel(name: str, size: int) -> None:
    """Two KV heads, or one: with more ranks each is held several times."""
    check(name, tensor_parallel_size=size, enforce_eager=True)


@pytest.mark.parametrize("name", ["cla4_top1", "v1_1_8b"])
def test_pipeline_parallel(name: str) -> None:
    """vLLM's CPU runner needs a compile mode for a pipeline; the backend "eager" compiles nothing."""
    check(
        name,
        pipeline_parallel_size=2,
        enforce_eager=False,
        compilation_config={"mode": 2, "backend": "eager"},
        kv_cache_memory_bytes=32 * MIB,
    )
