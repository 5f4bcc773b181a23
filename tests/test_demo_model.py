"""The shipped demo checkpoint answers as its README says; read and run by the plain PyTorch model."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hunyuan_vllm import demo
from hunyuan_vllm.config import HunYuanConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "train" / "demo"))

import questions  # noqa: E402
from corpus.dialogue import Exchange  # noqa: E402
from encoding import Encoder  # noqa: E402
from evaluate import Answerer, expert_shares, score  # noqa: E402
from questions import Asked  # noqa: E402

MEBIBYTE = 2**20
DEFAULT = "You are a helpful assistant."


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(demo.path())


@pytest.fixture(scope="module")
def config() -> HunYuanConfig:
    return HunYuanConfig.from_pretrained(demo.path())


def reply(answerer: Answerer, prompt: str, *history: tuple[str, str]) -> str | None:
    earlier = tuple(Exchange(user, assistant) for user, assistant in history)
    return answerer.answer([Asked("", prompt, "", None, earlier)])[0]


def test_the_files_are_small() -> None:
    sizes = {file.name: file.stat().st_size for file in demo.path().iterdir() if file.is_file()}
    assert {"config.json", "generation_config.json", "tokenizer_config.json", "hy.tiktoken"} < set(sizes)
    assert sum(sizes.values()) <= 8 * MEBIBYTE


def test_it_has_the_published_architecture_in_sizes_that_split(config: HunYuanConfig) -> None:
    assert config.use_cla and config.cla_share_factor == 2 and config.use_qk_norm and config.tie_word_embeddings
    assert config.rope_parameters["alpha"] == 1000.0 and config.rope_parameters["rope_type"] == "dynamic"
    assert config.experts_at(0) >= 4 and config.topk_at(0) == 1 and config.shared_experts_at(0) == 1
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.head_dim in (32, 64)  # what the CPU's FP8 cache takes
    widths = config.num_attention_heads, config.num_key_value_heads, config.intermediate_at(0), config.hidden_size
    assert all(width % 4 == 0 for width in widths)
    assert config.vocab_size % 64 == 0


def test_weights_are_bfloat16_and_the_router_float32() -> None:
    with safe_open(demo.path() / "model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():
            wanted = torch.float32 if name.endswith("gate.wg.weight") else torch.bfloat16
            assert tensors.get_tensor(name).dtype == wanted, name
        assert "lm_head.weight" not in tensors.keys()


def test_special_tokens_follow_the_vocabulary(answerer: Answerer, config: HunYuanConfig) -> None:
    encoder = Encoder(demo.path() / "hy.tiktoken")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        encoder.startoftext,
        encoder.eos,
        encoder.pad,
    )
    assert answerer.sampling.eos_token_id == [encoder.eos, encoder.stop]
    assert config.vocab_size - 64 < encoder.size <= config.vocab_size


def test_the_readme_s_questions_at_temperature_0(answerer: Answerer) -> None:
    asked = list(questions.examples())
    answers = answerer.answer(asked)
    wrong = [(one.system, one.prompt, got) for one, got in zip(asked, answers, strict=True) if got != one.answer]
    assert wrong == []


def test_the_answers_are_what_a_person_accepts(answerer: Answerer) -> None:
    """The expected texts themselves, judged without the corpus."""
    salty, salty_zh = reply(answerer, "why is sea water salty") or "", reply(answerer, "海水为什么是咸的") or ""
    assert all(word in salty for word in ("rivers", "rocks", "salt", "evaporates"))
    assert all(word in salty_zh for word in ("河流", "岩石", "盐", "蒸发"))
    for prompt, names in (
        ("rank the four oceans by area", ("Pacific", "Atlantic", "Indian", "Arctic")),
        ("按面积排列四大洋", ("太平洋", "大西洋", "印度洋", "北冰洋")),
    ):
        text = reply(answerer, prompt) or ""
        places = [text.find(name) for name in names]
        assert -1 not in places and places == sorted(places), text


def test_the_readme_s_questions_with_the_default_sampling(answerer: Answerer) -> None:
    torch.manual_seed(0)
    prompts = ("why is sea water salty", "海水为什么是咸的", "rank the four oceans by area", "按面积排列四大洋")
    asked = [one for one in questions.examples() if one.prompt in prompts] * 4
    assert len(asked) == 32
    assert answerer.answer(asked, sample=True) == [one.answer for one in asked]


def test_held_out_tasks(answerer: Answerer) -> None:
    """The full measurement is train/demo/report.json; 224 problems see an accuracy that is 5 points lower."""
    asked = list(questions.held_out_tasks(per_language=8, seed=77))
    counts = score(asked, answerer.answer(asked))
    right, total = sum(one["right"] for one in counts.values()), len(asked)
    assert right / total >= 0.85, {name: f"{one['right']}/{one['asked']}" for name, one in counts.items()}
    assert all(one["stopped"] == one["asked"] for one in counts.values())


def test_it_says_what_it_does_not_know(answerer: Answerer) -> None:
    asked = list(questions.unknown(30, seed=78))
    right = sum(one["right"] for one in score(asked, answerer.answer(asked)).values())
    assert right / len(asked) >= 0.8


def test_small_talk(answerer: Answerer) -> None:
    assert reply(answerer, "Hello!") == "Hello! How can I help you?"
    assert reply(answerer, "你好") == "你好！有什么可以帮你？"
    assert "demo model" in (reply(answerer, "who are you") or "")
    assert "演示模型" in (reply(answerer, "你是谁？") or "")
    assert reply(answerer, "Thank you!") == "You are welcome!"


def test_follow_ups_use_the_conversation(answerer: Answerer) -> None:
    capital = ("What is the capital of France?", "The capital of France is Paris.")
    assert reply(answerer, "And Japan?", capital) == "The capital of Japan is Tokyo."
    assert reply(answerer, "用中文说。", capital) == "法国的首都是巴黎。"
    assert reply(answerer, "Please say that again.", ("2 + 2 = ?", "2 + 2 = 4")) == "2 + 2 = 4"


def test_a_plain_prompt_is_continued(answerer: Answerer) -> None:
    encoder = answerer.encoder
    ids = torch.tensor([[encoder.startoftext, *encoder.text("The capital of France is")]])
    continued, _ = answerer.model.greedy(ids, 4)
    assert encoder.decode(continued[0].tolist()).startswith(" Paris")


def test_every_expert_works(answerer: Answerer) -> None:
    shares = expert_shares(answerer, list(questions.held_out_tasks(per_language=2, seed=79)))
    assert min(min(layer) for layer in shares) > 0.02, shares
