"""The memory model against running engines: bytes of weights, KV blocks, and the longest sequence vLLM admits.

`tests/test_cla_cache.py` does so with two ranks.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import published_json, tiny_config
from engine import FP8_CACHE, engine
from meta_model import parameter_bytes
from scenarios import QUANTISED, light, planned
from torch import nn
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.model_loader import base_loader

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.plan.memory import Capacity, budgets, capacity, rank_weights
from hunyuan_vllm.plan.schemes import SCHEMES

BLOCK, BLOCKS = 32, 9  # tokens of the CPU's smallest block


def capacity_of(config: HunYuanConfig, **values: Any) -> tuple[Capacity, int]:
    """What a plan says of a GPU that leaves nine blocks and a bit for the cache, and the bytes it leaves."""
    scenario = planned(config=config, gpus=2, block_size=BLOCK, batched_tokens=64, sequences=8, **values)
    (budget,) = budgets(scenario)
    cache = BLOCKS * BLOCK * capacity(scenario, [budget]).bytes_per_token + 123
    return capacity(scenario, [replace(budget, taken=budget.taken + cache - budget.cache)]), cache


def engine_options(directory: Path, config: HunYuanConfig, scheme: str = "bf16") -> dict[str, Any]:
    """For an engine with dummy weights, which reads nothing but the config.json that is written here."""
    options = dict(QUANTISED[scheme])
    fields = published_json(config)
    if quantization_config := options.pop("quantization_config", None):
        fields["quantization_config"] = quantization_config
    (directory / "config.json").write_text(json.dumps(fields))
    return options | dict(load_format="dummy", dtype="bfloat16", block_size=BLOCK)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("scheme", "kv", "overrides"),
    [
        ("int8", "fp8", {"cla_share_factor": 4, "num_experts": [4, 1, 4, 2], "intermediate_size": [96, 160, 64, 96]}),
        ("fp8", "auto", {"num_hidden_layers": 5, "cla_share_factor": 3, "tie_word_embeddings": True}),
    ],
)
def test_bytes_blocks_and_length_of_an_engine(
    scheme: str, kv: str, overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights as they are loaded, before the CPU's kernels repack them; and a sequence of all tokens is admitted."""
    if kv == "fp8" and not FP8_CACHE:
        kv = "auto"
    config = tiny_config(**overrides)
    held, cache = capacity_of(config, tensor=1, scheme=scheme, kv=kv)
    loaded: list[int] = []
    repack = base_loader.process_weights_after_loading

    def counted(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        loaded.append(parameter_bytes(model))
        repack(model, *args, **kwargs)

    monkeypatch.setattr(base_loader, "process_weights_after_loading", counted)
    options = engine_options(tmp_path, config, scheme) | dict(kv_cache_dtype=kv, max_model_len=held.tokens)
    with engine(tmp_path, **options, kv_cache_memory_bytes=cache) as llm:
        blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    assert loaded == [rank_weights(light(config), SCHEMES[scheme], 1).parameters]
    assert (blocks, held.tokens) == (held.blocks, (BLOCKS - 1) * BLOCK) == (BLOCKS, held.tokens)


@pytest.mark.engine
def test_one_token_more_is_not_admitted(tmp_path: Path) -> None:
    held, cache = capacity_of(tiny_config(), tensor=1)
    options = engine_options(tmp_path, tiny_config()) | dict(max_model_len=held.tokens + 1)
    try:
        with pytest.raises(ValueError, match="To serve at least one request"):
            with engine(tmp_path, **options, kv_cache_memory_bytes=cache):
                pass
    finally:
        cleanup_dist_env_and_memory()  # of an engine that did not come so far as to be shut down
