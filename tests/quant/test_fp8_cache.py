"""An FP8 cache under unquantised weights: no quantisation config is there to bring scales, and keys need none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config, write_checkpoint
from engine import engine, needs_fp8_cache, random_prompts, score
from fp8_reference import round_cache
from golden_data import FLOAT32_TOLERANCE, answers_of
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from hunyuan_vllm import cla_cache
from hunyuan_vllm.quant.fp8 import CacheScales
from hunyuan_vllm.quant.layouts import cache_scale
from hunyuan_vllm.reference import HunYuanForCausalLM

PROMPTS = random_prompts(320, [8] * 48)


def scales(model: nn.Module) -> list[tuple[float, ...]]:
    """Every form of each layer's scales: K, V and of the queries that some backends quantise too."""
    attentions = [layer.self_attn.attn for layer in model.model.layers]
    return [
        (a._k_scale.item(), a._k_scale_cpu.item(), a._k_scale_float,
         a._v_scale.item(), a._v_scale_cpu.item(), a._v_scale_float,
         a._q_scale.item(), a._q_scale_float)
        for a in attentions
    ]  # fmt: skip


@pytest.mark.engine
@needs_fp8_cache
def test_unquantised_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without calibration; the same after a reload; and with norms under which a query could be beyond 448."""
    config = tiny_config(num_hidden_layers=6, cla_share_factor=3)
    directory = write_checkpoint(tmp_path / "model", config)
    reference = HunYuanForCausalLM.from_pretrained(directory, dtype=torch.float32)
    round_cache(reference, {})
    answers = answers_of(reference, directory, PROMPTS, 1)
    bound = 32**0.5 / 448
    expected = [(pytest.approx(bound),) * 3 + (1.0,) * 5] * 6

    said: list[tuple[str, ...]] = []
    monkeypatch.setattr(cla_cache.logger, "warning_once", lambda *message: said.append(message))
    with engine(directory, kv_cache_dtype="fp8") as llm:
        results = score(llm, PROMPTS)
        agree = [
            abs(ours - theirs) <= FLOAT32_TOLERANCE
            for result, item in zip(results, answers.items, strict=True)
            for ours, theirs in zip(result.prompt_logprobs, item.prompt_logprobs, strict=True)
        ]
        assert sum(agree) > 0.85 * len(agree)  # see test_fp8_engine.py
        assert llm.apply_model(scales) == [expected]
        llm.collective_rpc("reload_weights")
        assert llm.apply_model(scales) == [expected]

        def own_scales(self: Attention, act_dtype: torch.dtype) -> None:
            """As a quantisation of vLLM's own leaves them: each layer has what the checkpoint has for it."""
            self._v_scale_float = 0.5 ** extract_layer_index(self.layer_name)
            self._v_scale.fill_(self._v_scale_float)
            self._v_scale_cpu.fill_(self._v_scale_float)

        monkeypatch.setattr(Attention, "process_weights_after_loading", own_scales)
        llm.collective_rpc("reload_weights")
        (loaded,) = llm.apply_model(scales)
        assert [row[:3] for row in loaded] == [(pytest.approx(bound),) * 3] * 6
        assert [row[3:6] for row in loaded] == [(1.0,) * 3] * 3 + [(0.125,) * 3] * 3
        monkeypatch.setattr(Attention, "process_weights_after_loading", lambda self, act_dtype: None)

        def enlarge(model: nn.Module) -> list[float]:
            layer = model.model.layers[4].self_attn
            layer.qk_norm.query_weight.data.fill_(-30.0)
            layer.qk_norm.key_weight.data.fill_(10.0)
            layer.qk_norm.fold()
            layer.attn.process_weights_after_loading(torch.float32)
            return [attn[6] for attn in scales(model)]

        (queries,) = llm.apply_model(enlarge)
    assert queries == [1.0, 1.0, 1.0, 1.0, pytest.approx(300 * bound), 1.0]
    ((text, names),) = set(said)
    assert "the checkpoint has no %s, so the scale is 1" in text and names == "v_scale"


def test_which_scale_counts() -> None:
    given = CacheScales()
    assert (given.k(0), given.v(0)) == (None, None)
    given.keep("model.layers.0.self_attn.kv_scale", 2.0)
    assert (given.k(0), given.v(0)) == (2.0, 2.0)
    given.keep("model.layers.0.self_attn.v_scale", 3.0)
    assert (given.k(0), given.v(0), given.v(1)) == (2.0, 3.0, None)
    assert cache_scale("model.layers.12.self_attn.v_scale")
    assert not cache_scale("model.layers.12.self_attn.v_proj.weight_scale")
