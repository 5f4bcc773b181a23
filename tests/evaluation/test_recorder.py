"""The engine's record against the reference model: likelihoods, KL and agreement, however a passage is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import rewrite, tiny_config, write_checkpoint
from engine import engine, random_prompts
from torch import Tensor
from vllm import LLM, SamplingParams, TokensPrompt

from hunyuan_vllm.evaluation import recorder
from hunyuan_vllm.evaluation.engines import RECORDER
from hunyuan_vllm.evaluation.recorder import Scores, score_block
from hunyuan_vllm.reference import HunYuanForCausalLM

TOLERANCE = 2e-4
LENGTHS = (150, 7, 64)


def passages(vocab_size: int) -> list[tuple[list[int], list[int]]]:
    """Ids, and scored tokens: all, the last ones, and some in between."""
    first, second, third = random_prompts(vocab_size, LENGTHS)
    return [(first, list(range(1, 150))), (second, [5, 6]), (third, [1, 2, 30, 31, 63])]


def record(llm: LLM, file: Path, format: tuple[int, str] | None) -> tuple[tuple[int, str], list[Scores]]:
    """What the engine run's process does."""
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    vocab_size = llm.model_config.get_vocab_size()
    results = []
    llm.collective_rpc("quality_open", args=(str(file), format))
    for ids, scored in passages(vocab_size):
        llm.collective_rpc("quality", args=("begin", len(ids)))
        llm.generate(TokensPrompt(prompt_token_ids=ids), params, use_tqdm=False)
        answers = llm.collective_rpc("quality", args=("end", scored, ids))
        (answer,) = [answer for answer in answers if answer is not None]
        results.append(answer)
    llm.collective_rpc("quality", args=("close",))
    return results[0][0], [scores for _, scores in results]


@torch.inference_mode()
def log_probabilities(directory: Path) -> Iterator[Tensor]:
    """The reference model's distributions at the scored tokens, float64, [tokens, vocab], passage by passage."""
    model = HunYuanForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for ids, scored in passages(model.config.vocab_size):
        yield model(torch.tensor([ids])).logits[0, torch.tensor(scored) - 1].double().log_softmax(-1)


def check(scores: Sequence[Scores], a: Path, b: Path) -> None:
    """B's scores against the definitions, computed from both checkpoints by the reference model."""
    config_vocab = HunYuanForCausalLM.config_class.from_pretrained(a).vocab_size
    for (ids, scored), found, p, q in zip(
        passages(config_vocab), scores, log_probabilities(a), log_probabilities(b), strict=True
    ):
        nll = [-q[row, ids[token]].item() for row, token in enumerate(scored)]
        kl = (p.exp() * (p - q)).sum(-1).numpy()
        np.testing.assert_allclose(found["nll"], nll, atol=TOLERANCE)
        np.testing.assert_allclose(found["kl"], kl, atol=TOLERANCE, rtol=1e-3)
        assert found["same"] == (p.argmax(-1) == q.argmax(-1)).double().tolist()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "model", tiny_config())


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with one projection changed by a twentieth of its size."""
    directory = write_checkpoint(tmp_path_factory.mktemp("perturbed") / "model", tiny_config())

    def change(tensors: dict[str, Tensor]) -> None:
        weight = tensors["model.layers.2.self_attn.o_proj.weight"]
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        weight += (0.05 * weight.float().std() * noise).to(weight.dtype)

    rewrite(directory, change)
    return directory


def recording(directory: Path, **options: Any) -> Any:
    return engine(directory, worker_extension_cls=RECORDER, enable_prefix_caching=False, **options)


@pytest.mark.engine
def test_a_perturbed_checkpoint_and_itself(plain: Path, perturbed: Path, tmp_path: Path) -> None:
    """In one piece, and in parts of 32 tokens, which an engine of little memory computes one after the other."""
    with recording(plain) as llm:
        format, first = record(llm, tmp_path / "logits", None)
        _, again = record(llm, tmp_path / "logits", format)
    assert format == (320, "float32")
    assert (tmp_path / "logits").stat().st_size == 4 * 320 * (149 + 2 + 5)
    assert [scores["nll"] for scores in first] == [scores["nll"] for scores in again]
    assert all(value == 0 for scores in again for value in scores["kl"])
    assert all(value == 1 for scores in again for value in scores["same"])

    with recording(perturbed, max_num_batched_tokens=32, max_num_seqs=32) as llm:
        _, scores = record(llm, tmp_path / "logits", format)
    check(scores, plain, perturbed)
    kl = [value for one in scores for value in one["kl"]]
    assert np.mean(kl) > 10 * TOLERANCE  # so that agreement within it says something


@pytest.mark.engine
def test_two_ranks_and_the_whole_vocabulary_in_blocks(tmp_path: Path) -> None:
    """Hunyuan-Large's vocabulary: 129,024 logits a token, of which 65 tokens are in memory at a time."""
    config = tiny_config(vocab_size=129_024, num_hidden_layers=2, tie_word_embeddings=True)
    directory = write_checkpoint(tmp_path / "model", config)
    with recording(directory, tensor_parallel_size=2) as llm:
        format, first = record(llm, tmp_path / "logits", None)
        _, again = record(llm, tmp_path / "logits", format)
    assert recorder.BLOCK_BYTES // (4 * config.vocab_size) == 65
    assert (tmp_path / "logits").stat().st_size == 4 * 129_024 * (149 + 2 + 5)
    assert all(value == 0 for scores in again for value in scores["kl"])
    check(again, directory, directory)
    assert [scores["nll"] for scores in first] == [scores["nll"] for scores in again]


def test_scores_of_hand_made_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]), torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]])
    scores = score_block(q.log() + 3, torch.tensor([1, 2]), p.log() - 2)
    np.testing.assert_allclose(scores["nll"], [np.log(2), -np.log(0.7)], rtol=1e-6)
    np.testing.assert_allclose(scores["kl"], [0.25 * np.log(2), 0], atol=1e-7)
    assert scores["same"] == [0, 1]


def test_broken_logits_are_an_error() -> None:
    with pytest.raises(ValueError, match="not finite"):
        score_block(torch.tensor([[0.0, float("nan")]]), torch.tensor([0]))
