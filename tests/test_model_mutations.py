"""The golden checkpoints must see every plausible mistake: each test makes one in the engine, and must be far off."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config, write_checkpoint
from engine import engine, random_prompts, score
from golden_data import FLOAT32_TOLERANCE, GOLDEN, Golden, load_golden, reference_answers
from torch import nn

from hunyuan_vllm import model as model_module
from hunyuan_vllm.attention import FoldedQueryNorm, RoundedRotaryEmbedding
from hunyuan_vllm.checkpoint import check_headers
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError, Layout
from hunyuan_vllm.model import HunYuanForCausalLM

pytestmark = pytest.mark.engine

SEEN = 0.05  # mistakes move some log-probability by this at least; a correct engine stays below 1e-4


def worst(name: str) -> float:
    """Largest |Δ log p| over a golden checkpoint's prompts."""
    return worst_against(load_golden(name))


def worst_against(golden: Golden) -> float:
    with engine(golden.path) as llm:
        results = score(llm, [item.prompt for item in golden.items])
    return max(
        abs(ours - theirs)
        for result, item in zip(results, golden.items, strict=True)
        for ours, theirs in zip(result.prompt_logprobs, item.prompt_logprobs, strict=True)
    )


def test_no_mistake() -> None:
    assert worst("cla2_top1") <= FLOAT32_TOLERANCE


def test_owners_key_norm_used_for_cross_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    load = HunYuanForCausalLM.load_weights

    def load_and_confuse(self: HunYuanForCausalLM, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = load(self, weights)
        norms = [layer.self_attn.qk_norm for layer in self.model.layers]
        for layer, norm in enumerate(norms):
            norm.key_weight.data.copy_(norms[self.config.kv_owner(layer)].key_weight)
        return loaded

    monkeypatch.setattr(HunYuanForCausalLM, "load_weights", load_and_confuse)
    assert worst("cla2_top1") > SEEN


def test_key_weight_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FoldedQueryNorm, "fold", lambda self: self.weight.copy_(self.query_weight))
    assert worst("cla2_top1") > SEEN


def test_norm_before_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm_then_rotate(qk, positions, rotary, q_norm, k_norm, heads, key_heads):
        by_head = qk.view(len(qk), -1, rotary.head_size)
        q = q_norm(by_head[:, :heads].contiguous()).view(len(qk), -1)
        k = k_norm(by_head[:, heads:].contiguous()).view(len(qk), -1) if key_heads else None
        return rotary(positions, q, k)

    monkeypatch.setattr(model_module, "rotate_and_normalize", norm_then_rotate)
    assert worst("cla2_top1") > SEEN


def test_top1_renormalised(monkeypatch: pytest.MonkeyPatch) -> None:
    factory = model_module.FusedMoEFactory

    def renormalising(**options) -> nn.Module:
        return factory(**options | {"renormalize": True})

    monkeypatch.setattr(model_module, "FusedMoEFactory", renormalising)
    assert worst("cla2_top1") > SEEN


def test_top2_not_renormalised(monkeypatch: pytest.MonkeyPatch) -> None:
    factory = model_module.FusedMoEFactory
    monkeypatch.setattr(model_module, "FusedMoEFactory", lambda **options: factory(**options | {"renormalize": False}))
    assert worst("cla2_top2") > SEEN


def test_v1_top8_not_renormalised(monkeypatch: pytest.MonkeyPatch) -> None:
    factory = model_module.FusedMoEFactory
    monkeypatch.setattr(model_module, "FusedMoEFactory", lambda **options: factory(**options | {"renormalize": False}))
    assert worst("v1_a13b") > SEEN


@pytest.mark.parametrize("left_out", ["use_qk_norm", "use_mixed_mlp_moe"])
def test_v1_defaults_of_the_field_left_out(left_out: str, tmp_path: Path) -> None:
    """transformers' files leave both fields out; their tensors are there, so the loader refuses a reader of "off"."""
    shutil.copytree(GOLDEN / "v1_moe_tf", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {left_out: False}))
    with pytest.raises(CheckpointError, match="not part of this network"):
        check_headers(file.parent, Layout(HunYuanConfig.from_pretrained(file.parent)))


def test_v1_rounded_frequencies_with_plain_rope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hunyuan-Large's rounding, seen against the reference model."""
    config = tiny_config(architectures=["HunYuanMoEV1ForCausalLM"], use_cla=False, rope_scaling=None)
    directory = write_checkpoint(tmp_path / "plain_rope", config)
    answers = reference_answers(directory, random_prompts(config.vocab_size, [160] * 4), max_new_tokens=1)
    monkeypatch.setattr(HunYuanConfig, "is_v1", False)
    assert worst_against(answers) > SEEN


def test_float32_frequencies_with_plain_rope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No golden checkpoint has plain RoPE, so this one is seen against the reference model."""
    monkeypatch.delattr(RoundedRotaryEmbedding, "_compute_inv_freq")
    config = tiny_config(rope_scaling=None)
    directory = write_checkpoint(tmp_path / "plain_rope", config)
    answers = reference_answers(directory, random_prompts(config.vocab_size, [160] * 4), max_new_tokens=1)
    assert worst_against(answers) > SEEN
