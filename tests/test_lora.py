"""LoRA adapters on attention: on an owner's fused projection and on a cross layer's q_proj alone, against merging."""

from pathlib import Path
from typing import Any

import pytest
from adapters import adapter_pairs, rename_modules, write_adapter
from checkpoints import tiny_config, write_checkpoint
from engine import engine, random_prompts
from golden_data import FLOAT32_TOLERANCE, load_golden, reference_answers
from vllm import SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.quantize.source import Source
from hunyuan_vllm.train.merge import SAVE_DTYPES, Adapter, Merge

pytestmark = pytest.mark.engine

PARAMS = SamplingParams(temperature=0, max_tokens=16, logprobs=0, ignore_eos=True, detokenize=False)


def said(output: Any) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities."""
    (one,) = output.outputs
    tokens = list(one.token_ids)
    return tokens, [entry[token].logprob for entry, token in zip(one.logprobs, tokens, strict=True)]


def furthest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", [None, "v1_a13b"], ids=["CLA", "V1"])
def test_adapters_of_one_batch_equal_their_merged_checkpoints(name: str | None, tmp_path: Path) -> None:
    """Two at once and none, in one batch; against `merge-lora`'s checkpoints, by the reference and by the engine.

    One whose modules the network does not have is refused, and the others are answered.
    """
    base = load_golden(name).path if name else write_checkpoint(tmp_path / "base", tiny_config())
    config = HunYuanConfig.from_pretrained(base)
    merged, requests = [], []
    for number in (1, 2):
        adapter = write_adapter(tmp_path / f"adapter{number}", adapter_pairs(config, seed=number))
        merged.append(tmp_path / f"merged{number}")
        Merge(Source(base), Adapter(adapter, config), merged[-1], SAVE_DTYPES["fp32"]).run()
        requests.append(LoRARequest(f"adapter{number}", number, str(adapter)))
    (prompt,) = random_prompts(config.vocab_size, [50])
    given = TokensPrompt(prompt_token_ids=prompt)
    wrong = rename_modules(write_adapter(tmp_path / "wrong", adapter_pairs(config)), lambda name: f"model.{name}")
    with engine(base, enable_lora=True, max_lora_rank=8, max_loras=2) as llm:
        with pytest.raises(ValueError, match=r"adapter named \(.*/wrong\): none of its .* modules \(model.model."):
            llm.llm_engine.add_lora(LoRARequest("named", 3, str(wrong)))
        with pytest.raises(ValueError, match=r"adapter named: .*/wrong/.*: none of its .* modules"):
            llm.generate([given], PARAMS, lora_request=LoRARequest("named", 3, str(wrong)), use_tqdm=False)
        outputs = llm.generate([given] * 3, PARAMS, lora_request=[None, *requests], use_tqdm=False)
    answers = [said(output) for output in outputs]
    for directory, (tokens, logprobs) in zip([base, *merged], answers, strict=True):
        (answer,) = reference_answers(directory, [prompt], 16).items
        assert tokens == answer.greedy
        assert furthest(logprobs, answer.greedy_logprobs) <= FLOAT32_TOLERANCE
    assert len({tuple(tokens) for tokens, _ in answers}) == 3
    with engine(merged[0]) as llm:
        tokens, logprobs = said(*llm.generate([given], PARAMS, use_tqdm=False))
    assert tokens == answers[1][0]
    assert furthest(logprobs, answers[1][1]) <= FLOAT32_TOLERANCE
