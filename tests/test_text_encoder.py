"""Long text: cut only where every tokenisation has a boundary, and no length or shape of it brings an encoder down."""

import unicodedata
from pathlib import Path

import pytest
from tokenizer_texts import SMALL_VOCAB, VOCABS, random_texts, reference, reference_of, telling_texts, telling_tokens

from hunyuan_vllm import bpe
from hunyuan_vllm.bpe import TextEncoder, build_tokenizer, read_tokens


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("vocab", VOCABS)
def test_chunks_change_no_id(vocab: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_CHUNK", size)
    monkeypatch.setattr(bpe, "_MAX_THREADS", 1)
    encode, encoding = TextEncoder(read_tokens(vocab)), reference(vocab)
    cut = 0
    for text in random_texts(2500, seed=size):
        text = unicodedata.normalize("NFC", text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        assert encode(text) == encoding.encode(text, allowed_special="all"), ascii(text)
        assert encode(text, special_tokens=False) == encoding.encode_ordinary(text), ascii(text)
        cut += len(list(bpe._chunks(text))) > 1
    assert cut > 500


@pytest.mark.parametrize("size", [1 << 16, 1, 2, 5])
def test_text_is_split_as_the_published_pattern_splits_it(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_CHUNK", size)
    monkeypatch.setattr(bpe, "_MAX_THREADS", 1)
    tokens = telling_tokens()
    encode, encoding = TextEncoder(tokens), reference_of(tokens)
    for text in telling_texts(10_000, seed=size):
        assert encode(text) == encoding.encode(text), ascii(text)


def test_threads_keep_the_order() -> None:
    text = "\n".join(f"{number}: the salt in the sea water 海水里的盐" for number in range(20_000))
    assert len(text) > 8 * bpe._CHUNK
    expected = reference(SMALL_VOCAB).encode(text, allowed_special="all")
    assert TextEncoder(read_tokens(SMALL_VOCAB))(text) == expected


LONG = 1_200_000
LONG_TEXTS = {
    "spaces": " " * LONG,
    "spaces and a word": " " * LONG + "word",
    "spaces and a special token": " " * LONG + "<|eos|>",
    "spaces and half a special token": " " * LONG + "<|eos",
    "spaces and a control that Python takes for whitespace": " " * LONG + "\x1c",
    "spaces and a line feed": " " * LONG + "\n" + "word",
    "line feeds": "\n" * LONG + "word",
    "spaces and line feeds by turns": " \n" * (LONG // 2) + "word",
    "one letter": "a" * LONG,
    "one word": "saltwater" * (LONG // 9),
    "digits": "7" * LONG,
    "punctuation": "-=" * (LONG // 2),
    "one ideograph": "水" * (LONG // 4),
    "one emoji": "🌊" * (LONG // 8),
    "combining marks": "e" + "\u0301\u0323" * (LONG // 16),
}


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS.keys())
def test_a_very_long_run_of_anything_is_encoded(text: str) -> None:
    """tiktoken alone refuses the first five with "Max stack size exceeded"."""
    tokens = read_tokens(SMALL_VOCAB)
    ids = TextEncoder(tokens)(text)
    special = {len(tokens) + 3: b"<|eos|>"}
    assert b"".join(special.get(index) or tokens[index] for index in ids) == text.encode()


def test_the_pipeline_survives_more_whitespace_than_its_regex_engine_steps_back() -> None:
    """Oniguruma panics after ten million steps back in one match, and a panic is no Exception."""
    tokenizer = build_tokenizer(read_tokens(SMALL_VOCAB))
    text = " " * 10_100_000 + "word"
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokens[-1:]).endswith("d") and len(tokens) > 1000
