"""The shared cache itself: who owns what, who writes, what it costs, and that the arithmetic is the engine's."""

from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config, write_checkpoint
from engine import MIB, engine, greatest_difference, needs_fp8_cache, score
from golden_data import FLOAT32_TOLERANCE, load_golden
from meta_model import parameter_bytes
from vllm import _custom_ops as ops
from vllm.model_executor.layers.attention import Attention

from hunyuan_vllm import cla_cache, model
from hunyuan_vllm.cla_cache import kv_sharing_target
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.kv_cache import CacheShape
from hunyuan_vllm.network import Network
from hunyuan_vllm.plan.memory import rank_weights
from hunyuan_vllm.plan.schemes import SCHEMES

PUBLISHED = HunYuanConfig(
    use_cla=True, cla_share_factor=2, use_qk_norm=True, num_experts=16, use_mixed_mlp_moe=True, num_key_value_heads=8
)


def test_kib_a_token_of_the_published_model() -> None:
    """2 (K, V) · 64 layers · 8 heads · 80 · 2 bytes = 160 KiB, halved by CLA factor 2, and again by FP8."""
    assert CacheShape.of(PUBLISHED, sharing=False).bytes_per_token == 160 * 1024
    assert CacheShape.of(PUBLISHED).bytes_per_token == 80 * 1024
    assert CacheShape.of(PUBLISHED, itemsize=1).bytes_per_token == 40 * 1024
    assert CacheShape.of(PUBLISHED, tensor_parallel=8).bytes_per_token == 10 * 1024
    # Sixteen ranks hold each of eight heads twice.
    assert CacheShape.of(PUBLISHED, tensor_parallel=16).bytes_per_token == 10 * 1024


def test_a_pipeline_stage_counts_its_own_owners() -> None:
    stage = CacheShape.of(PUBLISHED, stage=range(16, 32))
    assert (stage.layers, stage.owners) == (16, 8)


@pytest.mark.parametrize(("layer", "owner"), [(0, None), (1, 0), (2, 0), (3, None), (5, 3), (10, 9)])
def test_sharing_targets(layer: int, owner: int | None) -> None:
    config = tiny_config(num_hidden_layers=12, cla_share_factor=3)
    target = kv_sharing_target(config, layer, f"model.layers.{layer}.self_attn.attn")
    assert target == (None if owner is None else f"model.layers.{owner}.self_attn.attn")


def test_the_switch_must_be_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUNYUAN_VLLM_CLA_SHARING", "maybe")
    with pytest.raises(ValueError, match="HUNYUAN_VLLM_CLA_SHARING='maybe' is not a switch: use 1 .* or 0"):
        kv_sharing_target(tiny_config(), 1, "model.layers.1.self_attn.attn")


def allocated_blocks(directory: Path, **options) -> int:
    with engine(directory, **options) as llm:
        blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    assert blocks is not None
    return blocks


@pytest.mark.engine
@pytest.mark.parametrize(
    ("factor", "kv_dtype", "ranks"),
    [(factor, "bfloat16", 1) for factor in (1, 2, 4)]
    + [pytest.param(factor, "fp8", ranks, marks=needs_fp8_cache) for factor, ranks in ((1, 1), (2, 1), (4, 1), (4, 2))],
)
def test_predicted_blocks_are_allocated_blocks(factor: int, kv_dtype: str, ranks: int, tmp_path: Path) -> None:
    """And the planner's bytes of experts are those of each rank; this width needs no padding by the CPU's kernels."""
    config = tiny_config(num_hidden_layers=8, cla_share_factor=factor, intermediate_size=128)
    directory = write_checkpoint(tmp_path / "model", config)
    memory, block_size = 7 * MIB + 12345, 64
    shape = CacheShape.of(config, tensor_parallel=ranks, itemsize={"bfloat16": 2, "fp8": 1}[kv_dtype])
    with engine(
        directory,
        dtype="bfloat16",
        kv_cache_dtype="fp8" if kv_dtype == "fp8" else "auto",
        kv_cache_memory_bytes=memory,
        block_size=block_size,
        tensor_parallel_size=ranks,
    ) as llm:
        blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        experts = llm.apply_model(partial(parameter_bytes, part=".experts."))
    assert blocks == shape.blocks(memory, block_size)
    assert experts == [rank_weights(Network.read(config.to_dict()), SCHEMES["bf16"], ranks).parts["experts"]] * ranks


@pytest.mark.engine
def test_without_sharing_the_same_memory_holds_half(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load_golden("cla2_top1")
    shared = allocated_blocks(golden.path)
    monkeypatch.setenv("HUNYUAN_VLLM_CLA_SHARING", "0")
    assert allocated_blocks(golden.path) * 2 == shared


@pytest.mark.engine
def test_one_storage_a_group_written_by_its_owner_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLA factor 4, eight layers: two caches, and two writes a step."""
    golden = load_golden("cla4_top1")
    written: list[int] = []
    write = ops.cpu_attn_reshape_and_cache

    def recorded(key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, *args, **kwargs) -> None:
        written.append(key_cache.data_ptr())
        write(key, value, key_cache, *args, **kwargs)

    with engine(golden.path) as llm:
        monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", recorded)
        score(llm, [golden.items[0].prompt], max_tokens=3)
        (caches,) = llm.apply_model(
            lambda model: [layer.self_attn.attn.kv_cache.data_ptr() for layer in model.model.layers]
        )
    assert len(set(caches)) == 2
    assert caches == [caches[0]] * 4 + [caches[4]] * 4
    assert written == [caches[0], caches[4]] * 3


@pytest.mark.engine
def test_readers_can_be_handed_the_owners_k_and_v(monkeypatch: pytest.MonkeyPatch) -> None:
    """As decode context parallelism needs it: readers see their owner's k̂ and v of the step and write nothing."""
    golden = load_golden("cla4_top1")
    handed: list[tuple[str, int, int]] = []
    forward = Attention.forward

    def recorded(self: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args) -> torch.Tensor:
        handed.append((self.layer_name, key.data_ptr(), value.data_ptr()))
        return forward(self, query, key, value, *args)

    monkeypatch.setattr(model, "passes_kv", lambda: True)
    with engine(golden.path) as llm:
        results = score(llm, [item.prompt for item in golden.items], max_tokens=24)
        assert greatest_difference(results, golden) <= FLOAT32_TOLERANCE
        monkeypatch.setattr(Attention, "forward", recorded)
        score(llm, [golden.items[0].prompt])
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(8)]
    assert [name for name, _, _ in handed] == names
    pointers = [pointer[1:] for pointer in handed]
    assert pointers[:4] == [pointers[0]] * 4 and pointers[4:] == [pointers[4]] * 4


@pytest.mark.engine
def test_another_engine_goes_on_from_a_transferred_cache(tmp_path: Path) -> None:
    """Prefill and decode apart, by vLLM's connector that stores each layer's K and V."""
    golden = load_golden("cla4_top1")
    prompts = [item.prompt for item in golden.items]
    storage = {"shared_storage_path": str(tmp_path)}
    transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": storage}
    for new_tokens in (1, 24):
        with engine(golden.path, kv_transfer_config=transfer, enable_prefix_caching=False, block_size=32) as llm:
            results = score(llm, prompts, new_tokens, prompt_logprobs=False)
        assert greatest_difference(results, golden) <= FLOAT32_TOLERANCE
        assert any(result.cached_tokens for result in results) == (new_tokens > 1)


@pytest.mark.engine
def test_the_start_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(cla_cache.logger, "info", lambda text, *values: said.append(text % values))
    golden = load_golden("cla4_top1")
    with engine(golden.path, dtype="bfloat16", kv_cache_memory_bytes=32 * MIB):
        pass
    assert said[0] == (
        "CLA cache: 2 owner layers of 8 keep K and V; 0.5 KiB per token on each rank (2 without sharing); "
        "65536 tokens fit"
    )
