"""LoRA adapters on attention: on an owner's fused projection and on a cross layer's q_proj alone, against merging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import ALPHA, RANK, adapter_pairs, write_adapter
from checkpoints import rewrite, tiny_config, write_checkpoint
from engine import engine, random_prompts
from golden_data import FLOAT32_TOLERANCE, reference_answers
from vllm import SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.engine


def test_an_adapter_equals_its_merged_checkpoint(tmp_path: Path) -> None:
    config = tiny_config()
    base = write_checkpoint(tmp_path / "base", config)
    merged = write_checkpoint(tmp_path / "merged", config)
    pairs = adapter_pairs(config)

    def merge(tensors: dict[str, torch.Tensor]) -> None:
        for name, (a, b) in pairs.items():
            tensors[name] = tensors[name].float() + b @ a * (ALPHA / RANK)

    rewrite(merged, merge)
    request = LoRARequest("adapter", 1, str(write_adapter(tmp_path / "adapter", pairs)))
    (prompt,) = random_prompts(config.vocab_size, [50])
    params = SamplingParams(temperature=0, max_tokens=16, logprobs=0, ignore_eos=True, detokenize=False)
    with engine(base, enable_lora=True, max_lora_rank=8, max_loras=1) as llm:
        for folder, lora in ((base, None), (merged, request)):
            (output,) = llm.generate([TokensPrompt(prompt_token_ids=prompt)], params, lora_request=lora, use_tqdm=False)
            (answer,) = reference_answers(folder, [prompt], 16).items
            tokens = list(output.outputs[0].token_ids)
            logprobs = [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
            assert tokens == answer.greedy
            assert max(abs(a - b) for a, b in zip(logprobs, answer.greedy_logprobs, strict=True)) <= FLOAT32_TOLERANCE
