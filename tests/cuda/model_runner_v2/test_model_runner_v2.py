"""Model Runner V2, which vLLM uses by default on GPUs, answers as the older one does: on the demo model, whose layers
share caches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine import Scored, engine, score
from vllm.triton_utils import HAS_TRITON
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu import model_runner

import hunyuan_vllm.demo
from hunyuan_vllm.expert_load import EXTENSION, Loads
from hunyuan_vllm.plugin import register

DEMO = Path(hunyuan_vllm.demo.__file__).parent
PROMPTS = [list(range(5, 45)), list(range(100, 170)), [7, 8, 9]]
NEW_TOKENS = 8


def answers(monkeypatch: pytest.MonkeyPatch, version: int) -> tuple[list[Scored], Loads, Loads]:
    """The runner's, the load of experts, and the same after a batch such as idle data-parallel engines run."""
    register()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(version - 1))
    with engine(DEMO, worker_extension_cls=EXTENSION) as llm:
        (runner,) = llm.collective_rpc(lambda worker: type(worker.model_runner))
        assert (runner is CPUModelRunner) == (version == 2)
        llm.collective_rpc("expert_load", args=(True,))
        results = score(llm, PROMPTS, NEW_TOKENS)
        (loads,) = llm.collective_rpc("expert_load")
        llm.collective_rpc("execute_dummy_batch")
        (after,) = llm.collective_rpc("expert_load")
    return results, loads, after


def test_v2_answers_as_v1_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches with padding, as CUDA graphs have it: no row of it is counted as a token of an expert."""
    assert HAS_TRITON
    stock, padded = model_runner.dispatch_cg_and_sync_dp, []

    def dispatch(*args: Any, **options: Any) -> Any:
        batch, rest = stock(*args, **options)
        padded.append(-batch.num_tokens % 16)
        return replace(batch, num_tokens=batch.num_tokens + padded[-1]), rest

    monkeypatch.setattr(model_runner, "dispatch_cg_and_sync_dp", dispatch)
    (v1, v1_loads, _), (v2, v2_loads, v2_after) = answers(monkeypatch, 1), answers(monkeypatch, 2)
    assert any(padded)
    for one, two in zip(v1, v2, strict=True):
        assert one.tokens == two.tokens
        assert two.prompt_logprobs == pytest.approx(one.prompt_logprobs, abs=1e-5)
        assert two.logprobs == pytest.approx(one.logprobs, abs=1e-5)
    tokens = sum(len(prompt) + NEW_TOKENS - 1 for prompt in PROMPTS)
    assert {sum(load) for load in v1_loads.values()} == {tokens}
    assert v1_loads == v2_loads == v2_after
