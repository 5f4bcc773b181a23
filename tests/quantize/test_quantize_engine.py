"""The demo model, converted and served by the real engine, which takes the scheme from config.json by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine import FP8_CACHE, Scored, engine, score
from golden_data import FLOAT32_TOLERANCE, prompt_logprobs
from served import served
from torch import Tensor
from transformers import AutoTokenizer

from hunyuan_vllm import demo
from hunyuan_vllm.quantize.convert import quantize_checkpoint
from hunyuan_vllm.reference import HunYuanForCausalLM
from hunyuan_vllm.tokenizer import register_tokenizer

pytestmark = pytest.mark.engine

TEXTS = [
    "Rank the four oceans by area.", "What is 17 + 25?", "Name three colours of a rainbow.", "长江有多长？",
    "Translate into Chinese: good morning.", "请把这句话改得更正式。", "Which is larger, 7 or 12?", "Sort: fig, apple.",
    "Why is sea water salty?", "用三个词描述夏天。", "Spell the word ocean backwards.", "How many days has a week?",
]  # fmt: skip


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    register_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) for text in TEXTS]
    return [tokenizer(chat, add_special_tokens=False)["input_ids"] for chat in chats]


def logprobs_of(model: HunYuanForCausalLM, prompts: list[list[int]]) -> Tensor:
    return torch.cat([torch.tensor(prompt_logprobs(model, prompt)) for prompt in prompts])


def logprobs(results: list[Scored]) -> Tensor:
    return torch.cat([torch.tensor(result.prompt_logprobs) for result in results])


@pytest.mark.parametrize(
    ("scheme", "method", "agrees", "costs"),
    [
        ("fp8", "hunyuan_fp8", 0.6, 0.35),
        ("int8", "hunyuan_int8", 1.0, 0.1),
        ("int8-w8a8", "hunyuan_int8_w8a8", 0.6, 0.15),
    ],
)
def test_the_engine_computes_what_is_stored(
    tmp_path: Path, prompts: list[list[int]], scheme: str, method: str, agrees: float, costs: float
) -> None:
    """Rounded activations now and then fall to the other side in another order of sums: then a token, and those behind
    it, differ visibly; most must not.

    Args:
        agrees: share of the prompts' tokens whose log-probability is that of the few lines in served.py.
        costs: most that the mean of |Δ log p| against the BF16 checkpoint may be.
    """
    cache = scheme == "fp8" and FP8_CACHE
    quantize_checkpoint(demo.path(), tmp_path / "dst", scheme)
    with engine(tmp_path / "dst", kv_cache_dtype="fp8" if cache else "auto") as llm:
        assert llm.llm_engine.vllm_config.model_config.quantization == method
        ours = logprobs(score(llm, prompts))
    difference = (ours - logprobs_of(served(tmp_path / "dst", cache), prompts)).abs()
    bf16 = logprobs_of(HunYuanForCausalLM.from_pretrained(demo.path(), dtype=torch.float32), prompts)
    assert (difference <= FLOAT32_TOLERANCE).float().mean() >= agrees and difference.mean() < 0.02
    assert (ours - bf16).abs().mean() < costs
