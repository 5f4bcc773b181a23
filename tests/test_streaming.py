"""vLLM's incremental detokenizer over our tokens: no half characters on the way, nothing missing at the end."""

import random
import shutil
from pathlib import Path

import pytest
from tokenizer_texts import EMOJI, SMALL_VOCAB, WORDS, random_texts
from transformers import AutoConfig
from vllm import SamplingParams
from vllm.tokenizers import get_tokenizer
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer, IncrementalDetokenizer

from hunyuan_vllm.bpe import read_tokens
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.tokenizer import HYTokenizer, register_tokenizer

CONFIG = Path(__file__).parent / "golden" / "cla2_top1" / "config.json"
BYTE_IDS = {token[0]: rank for rank, token in enumerate(read_tokens(SMALL_VOCAB)) if len(token) == 1}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HYTokenizer:
    AutoConfig.register(HunYuanConfig.model_type, HunYuanConfig, exist_ok=True)
    register_tokenizer()
    directory = tmp_path_factory.mktemp("checkpoint")
    shutil.copy(CONFIG, directory / "config.json")
    shutil.copy(SMALL_VOCAB, directory / "hy.tiktoken")
    return get_tokenizer(directory)


def stream(tokenizer: HYTokenizer, prompt: list[int], ids: list[int], step: int = 1, **sampling: object) -> list[str]:
    """What a client of a stream receives after every `step` tokens."""
    request = EngineCoreRequest(
        request_id="0",
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=SamplingParams(**sampling),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
    assert isinstance(detokenizer, FastIncrementalDetokenizer)
    received = []
    for start in range(0, len(ids), step):
        detokenizer.update(ids[start : start + step], stop_terminated=False)
        received.append(detokenizer.get_next_output_text(finished=start + step >= len(ids), delta=True))
    return received


def by_bytes(text: str) -> list[int]:
    """The worst a model can do: one token a byte."""
    return [BYTE_IDS[byte] for byte in text.encode()]


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(
    "text", ["😀", "海水为什么是咸的？", " 👨‍👩‍👧‍👦🇨🇳", "a\u0301한é🌊.", "\ufffd a \ufffd\ufffd!", *EMOJI, *WORDS]
)
def test_characters_arrive_whole(tokenizer: HYTokenizer, text: str, step: int) -> None:
    prompt = tokenizer.encode("海")
    for ids in (by_bytes(text + "."), tokenizer.encode(text + ".", add_special_tokens=False)):
        received = stream(tokenizer, prompt, ids, step)
        assert "".join(received) == tokenizer.decode(ids)
        assert [piece for piece in received if "\ufffd" in piece and "\ufffd" not in text] == []


def test_a_stream_by_bytes_shows_each_character_with_its_last_byte(tokenizer: HYTokenizer) -> None:
    assert stream(tokenizer, [], by_bytes("é海😀a")) == ["", "é", "", "", "海", "", "", "", "😀", "a"]


def test_a_prompt_that_ends_inside_a_character_does_not_show_in_the_answer(tokenizer: HYTokenizer) -> None:
    prompt = by_bytes("海水")
    assert "".join(stream(tokenizer, prompt[:-1], [*prompt[-1:], *by_bytes(" a海")])).endswith(" a海")
    assert stream(tokenizer, by_bytes("海"), by_bytes("水"))[-1] == "水"


def test_texts_of_every_kind(tokenizer: HYTokenizer) -> None:
    rng = random.Random(0)
    for text in random_texts(500, seed=5):
        ids = tokenizer.encode(text, add_special_tokens=False) + by_bytes(".")
        received = stream(tokenizer, [2201], ids, rng.choice((1, 2, 5)), skip_special_tokens=False)
        assert "".join(received) == tokenizer.decode(ids), ascii(text)


def test_tokens_that_are_no_utf8_end_up_replaced(tokenizer: HYTokenizer) -> None:
    """A stream holds back a token that ends inside a character; if nothing follows, only that token is missing."""
    rng = random.Random(0)
    for _ in range(500):
        ids = rng.choices(range(2200), k=rng.randint(1, 30))
        received, whole = "".join(stream(tokenizer, [2201], ids)), tokenizer.decode(ids)
        assert whole.startswith(received)
        assert received == whole or whole.endswith("\ufffd")


def test_special_tokens_are_skipped_or_shown(tokenizer: HYTokenizer) -> None:
    ids = tokenizer.encode("sea<|extra_0|><|eos|>水", add_special_tokens=False)
    assert "".join(stream(tokenizer, [2201], ids)) == "sea水"
    shown = stream(tokenizer, [2201], ids, skip_special_tokens=False)
    assert "".join(shown) == "sea<|extra_0|><|eos|>水"
    close = stream(tokenizer, [2201], ids, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert "".join(close) == "sea<|extra_0|><|eos|>水"


def test_a_stop_string_across_tokens(tokenizer: HYTokenizer) -> None:
    ids = by_bytes("海水是咸的。不是甜的")
    assert "".join(stream(tokenizer, [2201], ids, stop=["。不"])).startswith("海水是咸的")
