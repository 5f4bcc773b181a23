"""LoRA adapters on attention: on an owner's fused projection and on a cross layer's q_proj alone, against merging."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import random_tensors, rewrite, tiny_config, write_checkpoint
from engine import engine, random_prompts
from golden_data import FLOAT32_TOLERANCE, reference_answers
from safetensors.torch import save_file
from vllm import SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

from hunyuan_vllm.config import HunYuanConfig

pytestmark = pytest.mark.engine

RANK, ALPHA = 4, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def adapter_pairs(config: HunYuanConfig) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight name → (A `[rank, in]`, B `[out, rank]`) for every attention projection the network has."""
    generator = torch.Generator().manual_seed(3)
    pairs = {}
    for name, tensor in random_tensors(config, seed=0):
        if name.endswith(".weight") and name.split(".")[-2] in TARGETS:
            a = torch.randn(RANK, tensor.shape[1], generator=generator) / tensor.shape[1] ** 0.5
            b = torch.randn(tensor.shape[0], RANK, generator=generator) / RANK**0.5
            pairs[name] = (a, b)
    return pairs


def write_adapter(folder: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    """PEFT's layout."""
    folder.mkdir()
    tensors = {}
    for name, (a, b) in pairs.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a, b
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = dict(peft_type="LORA", r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), bias="none")
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return folder


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
