"""Start a real engine on a checkpoint, score token ids with it, and compare with golden or reference answers."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from forked_engines import EAGER
from golden_data import Golden
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform

MIB = 1 << 20
FP8_CACHE = not current_platform.is_cpu() or torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
# The graph that the compiler gets, of which it makes no C++, which takes half a minute: for tests of that graph.
TRACED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "aot_eager"}}
needs_fp8_cache = pytest.mark.skipif(
    not FP8_CACHE, reason="vLLM's attention reads FP8 caches on CPUs with AVX-512 or AMX only"
)


@dataclass(frozen=True)
class Scored:
    """One prompt's result."""

    prompt_logprobs: list[float]
    """log p of prompt[i + 1] given prompt[: i + 1]."""
    tokens: list[int]
    logprobs: list[float]
    cached_tokens: int
    """Prompt tokens that came from the prefix cache."""


@contextmanager
def _own_garbage() -> Iterator[None]:
    """In the block the garbage collector looks at what is made in it, and at nothing older.

    vLLM collects nine times in an engine's life; each time takes a third of a second where it looks at all that vLLM
    and PyTorch consist of. vLLM itself freezes that together with the engine, which here is to be collected afterwards.
    """
    gc.collect()
    gc.freeze()
    with mock.patch.object(gc, "freeze", lambda: None), mock.patch.object(gc, "unfreeze", lambda: None):
        yield


@contextmanager
def engine(path: Path, **options: Any) -> Iterator[LLM]:
    """An in-process engine (its TP and PP workers are processes), eager, float32, 64 MiB of cache unless overridden."""
    defaults: dict[str, Any] = dict(
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        kv_cache_memory_bytes=64 * MIB,
        seed=0,
        disable_log_stats=False,
    )
    options = defaults | options
    eager = {EAGER: "1"} if options["enforce_eager"] else {}
    with _own_garbage():
        with mock.patch.dict(os.environ, eager):
            llm = LLM(model=str(path), **options)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


def score(llm: LLM, prompts: Sequence[list[int]], max_tokens: int = 1, prompt_logprobs: bool = True) -> list[Scored]:
    """Greedy continuations with log-probabilities. Asking for prompt log-probabilities bypasses the prefix cache."""
    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        logprobs=0,
        prompt_logprobs=0 if prompt_logprobs else None,
        ignore_eos=True,
        detokenize=False,
    )
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False)
    results = []
    for prompt, output in zip(prompts, outputs, strict=True):
        given = output.prompt_logprobs or [None]
        tokens = list(output.outputs[0].token_ids)
        results.append(
            Scored(
                [entry[token].logprob for entry, token in zip(given[1:], prompt[1:], strict=False)],
                tokens,
                [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, tokens, strict=True)],
                output.num_cached_tokens or 0,
            )
        )
    return results


def greatest_difference(results: Sequence[Scored], golden: Golden) -> float:
    """Largest |Δ log p| against the golden float32 answers; infinite if a greedy token differs."""
    worst = 0.0
    for result, item in zip(results, golden.items, strict=True):
        if result.tokens != item.greedy[: len(result.tokens)]:
            return float("inf")
        worst = max(worst, *_distances(result.logprobs, item.greedy_logprobs))
        worst = max(worst, *_distances(result.prompt_logprobs, item.prompt_logprobs), 0.0)
    return worst


def mean_difference(results: Sequence[Scored], golden: Golden) -> float:
    """Mean |Δ log p| of the prompts' tokens against the golden float32 answers."""
    distances = [
        distance
        for result, item in zip(results, golden.items, strict=True)
        for distance in _distances(result.prompt_logprobs, item.prompt_logprobs)
    ]
    return sum(distances) / len(distances)


def _distances(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(ours, theirs, strict=False)] or [0.0]


def random_prompts(vocab_size: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def counter(llm: LLM, name: str) -> float:
    """Value of one of vLLM's Prometheus counters."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)
