"""The plan: exact where it is arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import ALPHA_ROPE, VARIANTS, tiny_config, write_checkpoint

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.quant.schemes import WRITTEN
from hunyuan_vllm.quantize.convert import Options, Plan, quantize_checkpoint, state_bytes
from hunyuan_vllm.quantize.writer import Workspace

PUBLISHED = HunYuanConfig(
    num_experts=16, num_key_value_heads=8, use_mixed_mlp_moe=True, use_cla=True, cla_share_factor=2, use_qk_norm=True,
    rope_scaling=ALPHA_ROPE, tie_word_embeddings=True,
)  # fmt: skip


def test_the_published_network_on_paper() -> None:
    plan = Plan.of(PUBLISHED, Options("fp8"))
    assert plan.parameters == pytest.approx(388.7e9, rel=1e-3)
    assert plan.source_bytes == pytest.approx(2 * plan.parameters, rel=1e-4)
    embedding = 129024 * 6400
    assert plan.written_bytes == pytest.approx(plan.parameters + embedding, rel=1e-3)
    assert plan.files == 81  # a 5 GB file holds 42 of its experts' projections of 117 million weights
    assert 2e9 < plan.memory < 6e9  # the embedding alone is 1.65 GB


def test_int8_needs_no_calibration_unless_it_smooths() -> None:
    plain, smooth = (Plan.of(PUBLISHED, Options("int8", smooth=alpha)) for alpha in (None, 0.5))
    assert plain.memory_calibrating == plain.state_bytes == 0
    assert smooth.memory_calibrating > 0 and smooth.state_bytes > 1e9
    said = ["\n".join(plan.lines()) for plan in (plain, smooth)]
    assert ["calibrating" in text for text in said] == [False, True]


@pytest.mark.parametrize("scheme", WRITTEN)
@pytest.mark.parametrize("variant", ["tiny", "per_layer_fields"])
def test_bytes_on_paper_are_bytes_on_disk(
    tmp_path: Path, documents: list[list[int]], scheme: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(**VARIANTS.get(variant, {}))
    kept: list[int] = []
    finish = Workspace.finish
    monkeypatch.setattr(Workspace, "finish", lambda self: (kept.append(self.state_bytes()), finish(self)))
    source = write_checkpoint(tmp_path / "src", config)
    report = quantize_checkpoint(source, tmp_path / "dst", scheme, calibration=documents)
    plan = Plan.of(config, Options(scheme, calibration_tokens=250))
    assert (plan.source_bytes, plan.written_bytes) == (report["source_bytes"], report["written_bytes"])
    # Headers come on top, and activations are in bfloat16 here.
    assert kept[0] <= plan.state_bytes * 1.3 + 50_000
    assert (scheme == "fp8") == (plan.state_bytes > 0) == (kept[0] > 0)


def test_state_grows_with_tokens() -> None:
    assert state_bytes(PUBLISHED, 20_000) - state_bytes(PUBLISHED, 10_000) == 2 * 10_000 * (6400 + 2 * 640) * 4
