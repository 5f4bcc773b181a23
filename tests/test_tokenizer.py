"""HYTokenizer through AutoTokenizer and vLLM: the ids of tiktoken, whatever way they are asked for."""

import copy
import json
import pickle
import random
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import SMALL_VOCAB, SPECIALS, VOCABS, expected_ids, random_texts, reference
from transformers import AutoConfig, AutoTokenizer
from vllm.tokenizers import get_tokenizer

from hunyuan_vllm.chat_template import CHAT_TEMPLATE
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.tokenizer import HYTokenizer, register_tokenizer

GOLDEN = Path(__file__).parent / "golden"
CONFIG = GOLDEN / "cla2_top1" / "config.json"
REMOTE = {"AutoTokenizer": ["tokenization_hy.HYTokenizer", None]}
START, END, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "<|eos|>", "<|pad|>"


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    AutoConfig.register(HunYuanConfig.model_type, HunYuanConfig, exist_ok=True)
    register_tokenizer()
    register_tokenizer()


def checkpoint(directory: Path, tokenizer_config: dict[str, Any] | None = None, vocab: Path = SMALL_VOCAB) -> Path:
    shutil.copy(CONFIG, directory / "config.json")
    shutil.copy(vocab, directory / "hy.tiktoken")
    if tokenizer_config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return directory


def load(directory: Path, tokenizer_config: dict[str, Any] | None = None) -> HYTokenizer:
    return AutoTokenizer.from_pretrained(checkpoint(directory, tokenizer_config), trust_remote_code=False)


@pytest.fixture(scope="module")
def small() -> HYTokenizer:
    return HYTokenizer(vocab_file=str(SMALL_VOCAB))


def test_v1_has_one_more_special_token(tmp_path: Path) -> None:
    """Of model_type hunyuan_v1_moe, whose tokenizer_config.json names the class, and remote code of the same name."""
    directory = checkpoint(tmp_path, {"tokenizer_class": "HYTokenizer", "auto_map": REMOTE})
    ranks = len(SMALL_VOCAB.read_text().splitlines())
    fields = json.loads((GOLDEN / "v1_moe_tf" / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | {"vocab_size": ranks + 210}))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert isinstance(tokenizer, HYTokenizer) and len(tokenizer) == ranks + 210
    assert tokenizer.encode("<|extra_204|>", add_special_tokens=False) == [ranks + 209]
    assert tokenizer(["<|extra_204|>"], add_special_tokens=False)["input_ids"] == [[ranks + 209]]
    assert len(load(tmp_path)) == ranks + 209, "Hunyuan-Large's vocabulary is larger than its tokens"


# ---- ids


@pytest.mark.parametrize("vocab", VOCABS)
def test_ids_are_those_of_tiktoken(vocab: Path) -> None:
    """20,000 strings, by tiktoken (one text) and by the `tokenizers` pipeline (a list of texts)."""
    tokenizer, encoding = HYTokenizer(vocab_file=str(vocab)), reference(vocab)
    texts = random_texts(20_000, seed=1)
    assert len(set(texts)) > 19_000
    expected = [expected_ids(encoding, text) for text in texts]
    by_pipeline = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for text, ids, pipeline_ids in zip(texts, expected, by_pipeline, strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, ascii(text)
        assert pipeline_ids == ids, ascii(text)
        assert tokenizer.decode(ids) == encoding.decode(ids), ascii(text)


@settings(max_examples=400, deadline=None)
@given(st.text(st.characters(codec=None) | st.sampled_from(" \n\r\t'<|>aſ中é\u0301\u0338"), max_size=60))
def test_ids_of_any_text(text: str) -> None:
    encoding, tokenizer = _SMALL_REFERENCE, _SMALL_TOKENIZER
    ids = expected_ids(encoding, text)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer([text], add_special_tokens=False)["input_ids"] == [ids]


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=60))
def test_decoding_gives_the_text_back(text: str) -> None:
    ids = _SMALL_TOKENIZER.encode(text, add_special_tokens=False)
    assert _SMALL_TOKENIZER.decode(ids) == unicodedata.normalize("NFC", text)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_have_tokens_and_decoding_replaces_what_is_no_utf8(data: bytes) -> None:
    alphabet = _SMALL_REFERENCE._mergeable_ranks
    ids = [alphabet[bytes([byte])] for byte in data]
    assert _SMALL_TOKENIZER.decode(ids) == data.decode("utf-8", errors="replace")


def test_decoding_any_tokens_replaces_what_is_no_utf8(small: HYTokenizer) -> None:
    rng = random.Random(0)
    malformed = 0
    for _ in range(3000):
        ids = rng.choices(range(len(small)), k=rng.randint(1, 12))
        text = small.decode(ids)
        assert text == _SMALL_REFERENCE.decode(ids)
        malformed += "\ufffd" in text
    assert malformed > 1000


_SMALL_REFERENCE = reference(SMALL_VOCAB)
_SMALL_TOKENIZER = HYTokenizer(vocab_file=str(SMALL_VOCAB))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("<|startoftext|>海<|extra_0|>", [START, "海", "<|extra_0|>"]),
        ("a<|eos|><|eos|>b", ["a", EOS, EOS, "b"]),
        ("<|extra_203|><|extra_204|>", ["<|extra_203|>", "<", "|", "extra", "_", "2", "0", "4", "|>"]),
        ("<|eos|>\u0338", ["<", "|", "e", "os", "|", "≯"]),  # NFC comes first: no special token is left
    ],
)  # fmt: skip
def test_special_tokens_in_text(small: HYTokenizer, text: str, tokens: list[str]) -> None:
    ids = small.encode(text, add_special_tokens=False)
    assert "".join(tokens) == unicodedata.normalize("NFC", text)
    special = [token for token in tokens if token in SPECIALS]
    assert [small.decode(index) for index in ids if small.decode(index) in SPECIALS] == special
    assert ids == expected_ids(_SMALL_REFERENCE, text)


def test_special_tokens_can_be_split(small: HYTokenizer) -> None:
    ids = _SMALL_REFERENCE.encode_ordinary("a <|eos|> b")
    assert small.encode("a <|eos|> b", add_special_tokens=False, split_special_tokens=True) == ids
    assert max(ids) < small.vocab_size


# ---- what surrounds the ids


@pytest.mark.parametrize(
    ("tokenizer_config", "head", "tail"),
    [
        (None, [START], []),
        ({"tokenizer_class": "HYTokenizer", "auto_map": REMOTE}, [START], []),
        ({"add_bod_token": False}, [], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eod_token": True}, [START], [END]),
        ({"add_eos_token": True, "add_bod_token": False}, [], [END]),
        ({"add_eod_token": False, "bos_token": "<|bos|>"}, [START], []),
    ],
)
def test_what_a_plain_text_gets(
    tmp_path: Path, tokenizer_config: dict[str, Any] | None, head: list[str], tail: list[str]
) -> None:
    tokenizer = load(tmp_path, tokenizer_config)
    ids = _SMALL_REFERENCE.encode_ordinary("sea water")
    head_ids, tail_ids = tokenizer.convert_tokens_to_ids(head), tokenizer.convert_tokens_to_ids(tail)
    assert tokenizer("sea water")["input_ids"] == head_ids + ids + tail_ids
    assert tokenizer.encode("sea water") == head_ids + ids + tail_ids
    assert tokenizer(["sea water"])["input_ids"] == [head_ids + ids + tail_ids]
    assert tokenizer("sea water", "sea water")["input_ids"] == 2 * (head_ids + ids + tail_ids)
    assert tokenizer("sea water", add_special_tokens=False)["input_ids"] == ids


def test_the_start_token_can_be_switched_off_and_on_again(small: HYTokenizer) -> None:
    tokenizer = copy.deepcopy(small)
    tokenizer.add_bos_token = False
    assert tokenizer.encode("a") == tokenizer(["a"])["input_ids"][0] == small.encode("a")[1:]
    tokenizer.add_bos_token = True
    assert tokenizer.encode("a") == tokenizer(["a"])["input_ids"][0] == small.encode("a")


def test_attributes(small: HYTokenizer) -> None:
    ranks = small.vocab_size
    assert (ranks, len(small)) == (2200, 2409)
    assert (small.bos_token, small.eos_token, small.pad_token) == (START, EOS, PAD)
    assert (small.bos_token_id, small.eos_token_id, small.pad_token_id) == (ranks + 1, ranks + 3, ranks + 4)
    assert sorted(small.all_special_ids) == list(range(ranks, ranks + 209))
    assert small.is_fast
    ids = small.encode("<|eos|>sea<|extra_7|>")
    assert small.decode(ids, skip_special_tokens=True) == "sea"
    assert small.convert_ids_to_tokens(ids, skip_special_tokens=True) == small.tokenize("sea")


def test_a_token_that_is_added_is_found(small: HYTokenizer) -> None:
    tokenizer = copy.deepcopy(small)
    tokenizer.add_tokens(["<tool>"])
    assert tokenizer.encode("a<tool>b") == [2201, *small.encode("a")[1:], len(small), *small.encode("b")[1:]]
    tokenizer.add_eos_token = True
    assert tokenizer.encode("a\u08d3\u0301") == [*small.encode("a\u08d3\u0301"), 2200]
    assert small.encode("a<tool>b", add_special_tokens=False) == _SMALL_REFERENCE.encode("a<tool>b")


# ---- one text by tiktoken, everything else by the pipeline: no difference to be seen


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("strategy", [True, "longest_first", "only_first"])
@pytest.mark.parametrize("max_length", [1, 2, 5, 100])
def test_truncation_is_that_of_the_pipeline(small: HYTokenizer, side: str, strategy: Any, max_length: int) -> None:
    tokenizer = copy.deepcopy(small)
    tokenizer.truncation_side = side
    for add_special_tokens in (True, False):
        arguments = {"truncation": strategy, "max_length": max_length, "add_special_tokens": add_special_tokens}
        one = tokenizer("Why is sea water salty? 海水为什么是咸的？", **arguments)
        (ids,) = tokenizer(["Why is sea water salty? 海水为什么是咸的？"], **arguments)["input_ids"]
        assert one["input_ids"] == ids and len(one["attention_mask"]) == len(ids) <= max_length


def test_the_alignment_is_there_when_asked_for(small: HYTokenizer) -> None:
    text = "e\u0301a 海水 🌊"  # not NFC: positions count the characters given
    encoded, batch = small(text), small([text])
    assert encoded.is_fast and encoded.tokens() == batch.tokens(0)
    a = encoded.tokens().index("a")
    assert [encoded.char_to_token(at) for at in (2, len(text) - 1)] == [a, len(encoded.tokens()) - 1]
    offsets = small(text, return_offsets_mapping=True)["offset_mapping"]
    assert offsets[a] == (2, 3) and offsets[-1] == (len(text) - 1, len(text))
    assert pickle.loads(pickle.dumps(encoded)).tokens() == encoded.tokens()


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": "max_length", "max_length": 12},
        {"return_tensors": "pt"},
        {"return_special_tokens_mask": True},
        {"return_token_type_ids": True},
        {"return_length": True},
        {"return_attention_mask": False},
        {"truncation": True, "max_length": 4, "return_overflowing_tokens": True},
    ],
)
def test_every_other_argument_has_its_effect(small: HYTokenizer, arguments: dict[str, Any]) -> None:
    one, batch = small("sea water", **arguments), small(["sea water"], **arguments)
    assert set(one) == set(batch)
    for name, value in batch.items():
        if "return_tensors" in arguments:
            assert one[name].tolist() == value.tolist()
        elif "return_overflowing_tokens" in arguments or name == "length":
            assert one[name] == value
        else:
            assert one[name] == value[0]


def test_copies_and_pickles_encode_alike(small: HYTokenizer) -> None:
    for twin in (copy.copy(small), copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert twin.encode("sea 海水 <|eos|>") == small.encode("sea 海水 <|eos|>")


# ---- loading


@pytest.mark.parametrize(
    "tokenizer_config",
    [
        None,
        {},
        {"tokenizer_class": "HYTokenizer", "auto_map": REMOTE, "model_max_length": 1048576},
        {"tokenizer_class": "HYTokenizer"},
        {"tokenizer_class": "HYTokenizerFast"},
        {"tokenizer_class": "HunYuanTokenizer"},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": "PreTrainedTokenizer"},
        {"auto_map": REMOTE},
    ],
)
def test_whatever_class_the_checkpoint_names(tmp_path: Path, tokenizer_config: dict[str, Any] | None) -> None:
    tokenizer = get_tokenizer(checkpoint(tmp_path, tokenizer_config), trust_remote_code=False)
    assert isinstance(tokenizer, HYTokenizer)
    assert tokenizer("sea water")["input_ids"][0] == 2201
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_special_tokens_that_the_checkpoint_lists_keep_their_ids(tmp_path: Path) -> None:
    listed = {"content": "<|extra_0|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False,
              "single_word": False}  # fmt: skip
    tokenizer = load(
        tmp_path,
        {
            "eos_token": END,
            "bod_token": START,
            "unk_token": None,
            "additional_special_tokens": ["<|extra_0|>", "<|extra_5|>"],
            "added_tokens_decoder": {"2205": listed},
        },
    )
    assert len(tokenizer) == 2409 and tokenizer.eos_token_id == 2200
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIALS] == list(range(2200, 2409))
    assert tokenizer.encode("<|extra_0|>\u0338", add_special_tokens=False)[0] != 2205
    assert tokenizer._text_encoder is not None


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    tokenizer = load(tmp_path / "first", {"add_eod_token": True, "eos_token": END})
    tokenizer.save_pretrained(tmp_path / "second")
    shutil.copy(CONFIG, tmp_path / "second" / "config.json")
    again = AutoTokenizer.from_pretrained(tmp_path / "second")
    assert isinstance(again, HYTokenizer)
    assert (
        len(again) == len(tokenizer) and again.eos_token == END and again.all_special_ids == tokenizer.all_special_ids
    )
    assert again.chat_template == tokenizer.chat_template
    for text in random_texts(300, seed=2):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = unicodedata.normalize("NFC", text)
        assert again.encode(text) == tokenizer.encode(text)


def test_a_tokenizer_json_is_used_as_it_is(tmp_path: Path, small: HYTokenizer) -> None:
    """Here one that does not normalise and adds no token, beside a hy.tiktoken that would."""
    pipeline = json.loads(small.backend_tokenizer.to_str())
    pipeline |= {"normalizer": None, "post_processor": None}
    checkpoint(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(pipeline))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("e\u0301") == _SMALL_REFERENCE.encode_ordinary("e\u0301")
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_a_checkpoint_with_no_tokenizer_is_named(tmp_path: Path) -> None:
    (checkpoint(tmp_path) / "hy.tiktoken").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path} has neither hy.tiktoken nor tokenizer.json"):
        get_tokenizer(tmp_path)


def test_a_damaged_vocabulary_is_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path) / "hy.tiktoken"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{path}, line 2200: the rank is 21 and should be 2199"):
        get_tokenizer(tmp_path)
