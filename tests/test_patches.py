"""Each patch of vLLM: the test fails once an engine without the patch does right, and the patch can go."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import tiny_config, write_checkpoint
from engine import engine, greatest_difference, random_prompts, score
from golden_data import FLOAT32_TOLERANCE, reference_answers
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from hunyuan_vllm import model, patches

pytestmark = pytest.mark.engine


def test_cpu_experts_still_need_repacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "process_weights_after_loading"
    patched = getattr(UnquantizedFusedMoEMethod, name)
    monkeypatch.setattr(UnquantizedFusedMoEMethod, name, getattr(patched, "__wrapped__", patched))
    monkeypatch.setattr(model, "apply_patches", lambda: None)
    config = tiny_config()
    first = write_checkpoint(tmp_path / "first", config)
    second = write_checkpoint(tmp_path / "second", config, seed=5)
    prompts = random_prompts(config.vocab_size, [60])
    with engine(first) as llm:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(second)})
        results = score(llm, prompts)
    assert greatest_difference(results, reference_answers(second, prompts, 1)) > FLOAT32_TOLERANCE


def test_patches_apply_once() -> None:
    patches.apply_patches()
    once = UnquantizedFusedMoEMethod.process_weights_after_loading
    patches.apply_patches()
    assert UnquantizedFusedMoEMethod.process_weights_after_loading is once
