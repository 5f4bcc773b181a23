"""What a real engine says of a checkpoint that is not sound, and weights that change while it runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_tensors, rewrite, tiny_config, write_checkpoint
from engine import engine, greatest_difference, random_prompts, score
from golden_data import FLOAT32_TOLERANCE, reference_answers

from hunyuan_vllm import preflight

pytestmark = pytest.mark.engine

V1 = dict(model_type="hunyuan_v1_moe", use_cla=False, num_experts=16, moe_topk=8, tie_word_embeddings=True)
NAME = "model.layers.3.mlp.experts.1.down_proj.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", tiny_config())


def refused(directory: Path, **options) -> str:
    with pytest.raises(Exception) as raised, engine(directory, **options):
        pass
    return str(raised.value)


def test_preflight_speaks_before_any_worker(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's process, from the headers: no engine is made."""
    rewrite(directory, lambda tensors: tensors.pop(NAME))
    monkeypatch.setattr(
        "vllm.v1.engine.llm_engine.EngineCoreClient.make_client", lambda *_, **__: pytest.fail("started")
    )
    assert f"lacks checkpoint tensor {NAME!r}" in refused(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value: float, directory: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME][-1, -1] = value

    rewrite(directory, spoil)
    assert f"{NAME!r} holds NaN or infinite values" in refused(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NAME), f"lacks tensor {NAME!r}"),
        (lambda tensors: tensors.update({"model.layers.9.x": torch.ones(1)}), "'model.layers.9.x' is not part of"),
        (lambda tensors: tensors.update({NAME: torch.ones(128, 95)}), f"{NAME!r} has shape [128, 95]"),
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_the_stream_is_checked_too(change, message: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights need not come from a directory of safetensors; then there are no headers to look at first."""
    monkeypatch.setattr(preflight, "check_headers", lambda *_: 0)
    rewrite(directory, change)
    assert message in refused(directory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tensor_parallel_size=3), "tensor_parallel_size=3 does not divide this network"),
        (dict(pipeline_parallel_size=4), "use at most 2 stages"),
        (dict(enable_expert_parallel=True, tensor_parallel_size=2), "enable_expert_parallel does not work on CPUs"),
        (dict(kv_sharing_fast_prefill=True), "kv_sharing_fast_prefill"),
        (dict(tensor_parallel_size=4, decode_context_parallel_size=2), "decode_context_parallel_size needs"),
    ],
    ids=["tp", "pp", "ep", "fast_prefill", "dcp"],
)
def test_what_cannot_work_is_refused_at_once(options: dict, message: str, directory: Path) -> None:
    assert message in refused(directory, **options)


@pytest.mark.parametrize("changes", [{}, V1], ids=["CLA", "V1"])
def test_reload_in_place(changes: dict[str, Any], tmp_path: Path) -> None:
    """vLLM's own reload from another path, then a single norm pushed as in reinforcement learning."""
    config = tiny_config(**changes)
    directory = write_checkpoint(tmp_path / "model", config)
    other = write_checkpoint(tmp_path / "other", config, seed=5)
    prompts = random_prompts(config.vocab_size, [60])
    name = "model.layers.1.self_attn.key_layernorm.weight"
    with engine(directory) as llm:
        assert greatest_difference(score(llm, prompts), reference_answers(directory, prompts, 1)) <= FLOAT32_TOLERANCE
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        llm.reset_prefix_cache()
        assert greatest_difference(score(llm, prompts), reference_answers(other, prompts, 1)) <= FLOAT32_TOLERANCE

        tensor = torch.full((32,), -0.5)
        llm.apply_model(lambda model: len(model.load_weights([(name, tensor)])))
        rewrite(other, lambda tensors: tensors.update({name: tensor}))
        llm.reset_prefix_cache()
        assert greatest_difference(score(llm, prompts), reference_answers(other, prompts, 1)) <= FLOAT32_TOLERANCE


def test_dummy_weights_are_filled_in_parts(directory: Path) -> None:
    """A trainer pushes a few tensors at a time into an engine that began with dummy weights."""
    tensors = dict(random_tensors(tiny_config(), seed=0))
    names = [f"model.layers.2.self_attn.{which}_layernorm.weight" for which in ("query", "key")]
    with engine(directory, load_format="dummy") as llm:
        for name in names:
            part = [(name, tensors[name])]
            llm.apply_model(lambda model, part=part: len(model.load_weights(part)))
        (folded,) = llm.apply_model(lambda model: model.model.layers[2].self_attn.qk_norm.weight.tolist())
    assert folded == (tensors[names[0]].float() * tensors[names[1]].float()).tolist()
