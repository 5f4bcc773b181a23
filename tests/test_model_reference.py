"""The engine against `reference.py` on random checkpoints: the config branches that no golden checkpoint has."""

from pathlib import Path
from typing import Any

import pytest
from checkpoints import VARIANTS, stack_experts, tiny_config, write_checkpoint
from engine import engine, greatest_difference, random_prompts, score
from golden_data import FLOAT32_TOLERANCE, reference_answers
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.engine

BRANCHES = {name: overrides for name, overrides in VARIANTS.items() if name != "rope_dynamic_factor"} | {
    "alpha_with_null_factor": dict(rope_scaling={"type": "dynamic", "alpha": 50.0, "factor": None}),
    "multi_head_without_cla": dict(num_key_value_heads=4, use_cla=False),
}


def check(directory: Path, prompts: list[list[int]], reference: Path | None = None, **options: Any) -> None:
    """The engine on `directory` must agree with the reference model on the same network."""
    answers = reference_answers(reference or directory, prompts, max_new_tokens=8)
    with engine(directory, **options) as llm:
        results = score(llm, prompts, max_tokens=8)
    assert greatest_difference(results, answers) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("branch", BRANCHES)
def test_config_branch(branch: str, tmp_path: Path) -> None:
    config = tiny_config(**BRANCHES[branch])
    directory = write_checkpoint(tmp_path / branch, config, seed=1)
    check(directory, random_prompts(config.vocab_size, [7, 90, 160]))


def test_biases_are_added_once_among_ranks(tmp_path: Path) -> None:
    config = tiny_config(**VARIANTS["biases"])
    directory = write_checkpoint(tmp_path / "biases", config)
    check(directory, random_prompts(config.vocab_size, [40]), tensor_parallel_size=2)


def test_rope_dynamic_factor(tmp_path: Path) -> None:
    """vLLM fixes the NTK base for the extended length; the length-dependent formula agrees there, and only there."""
    config = tiny_config(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=64)
    directory = write_checkpoint(tmp_path / "model", config)
    (prompt,) = random_prompts(config.vocab_size, [128])
    (answer,) = reference_answers(directory, [prompt], max_new_tokens=1).items
    with engine(directory, max_model_len=128) as llm:
        (result,) = score(llm, [prompt[:-1]])
    differences = [abs(a - b) for a, b in zip(result.prompt_logprobs, answer.prompt_logprobs, strict=False)]
    assert len(differences) == 126
    assert max(differences) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("options", [dict(fused=True), dict(fused=True, stray=True)], ids=["fused", "fused_and_stray"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_published_spelling_loads_alike(options: dict[str, bool], tied: bool, tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    plain = write_checkpoint(tmp_path / "plain", config)
    spelled = write_checkpoint(tmp_path / "spelled", config, **options)
    check(spelled, random_prompts(config.vocab_size, [60]), reference=plain)


def test_stacked_experts_load_alike(tmp_path: Path) -> None:
    config = tiny_config(moe_topk=2, moe_intermediate_size=64)
    plain = write_checkpoint(tmp_path / "plain", config)
    stacked = write_checkpoint(tmp_path / "stacked", config)
    tensors = stack_experts(load_file(plain / "model.safetensors"))
    save_file(tensors, stacked / "model.safetensors")
    check(stacked, random_prompts(config.vocab_size, [60]), reference=plain)


def test_alpha_rope_beyond_max_position_embeddings(tmp_path: Path) -> None:
    """The base is the same at any length, so the file's maximum changes no answer."""
    config = tiny_config(model_type="hunyuan_v1_dense", num_experts=1, use_cla=False, max_position_embeddings=64)
    directory = write_checkpoint(tmp_path / "short", config)
    check(directory, random_prompts(config.vocab_size, [9, 200]))
