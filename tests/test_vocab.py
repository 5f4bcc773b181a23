"""hy.tiktoken: the pipeline built from any ranks encodes as tiktoken does, and a damaged file is named."""

import base64
import random
import runpy
from pathlib import Path

import pytest
import tiktoken
from tokenizer_texts import (
    PATTERN,
    REAL_VOCAB,
    SMALL_VOCAB,
    SPECIALS,
    expected_ids,
    reference_of,
    telling_texts,
    telling_tokens,
)
from tokenizers import pre_tokenizers

from hunyuan_vllm.bpe import SPECIAL_TOKENS, build_tokenizer, byte_alphabet, read_tokens

BYTES = [bytes([byte]) for byte in range(256)]


def write(path: Path, tokens: list[bytes]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def test_any_ranks_merge_as_tiktoken_merges_them() -> None:
    """Tables no training would make: random words, in random order, with tokens that no merge can reach."""
    rng = random.Random(0)
    compared = 0
    for _ in range(150):
        letters = "abc"[: rng.choice((1, 2, 2, 3))]
        words = {"".join(rng.choices(letters, k=rng.randint(2, 8))).encode() for _ in range(rng.choice((5, 20, 60)))}
        tokens = BYTES + sorted(words)
        rng.shuffle(tokens)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        encoding = tiktoken.Encoding("any", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        tokenizer = build_tokenizer(tokens)
        for _ in range(100):
            text = "".join(rng.choices(letters, k=rng.choice((3, 8, 20, 150))))
            assert tokenizer.encode(text, add_special_tokens=False).ids == encoding.encode(text), (text, tokens)
            compared += 1
    assert compared == 15_000


def test_text_is_split_as_the_published_pattern_splits_it() -> None:
    tokens = telling_tokens()
    tokenizer, encoding = build_tokenizer(tokens), reference_of(tokens)
    for text in telling_texts(10_000, seed=0):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == expected_ids(encoding, text), ascii(text)


def test_special_tokens_follow_the_last_rank() -> None:
    assert list(SPECIAL_TOKENS) == SPECIALS
    tokenizer = build_tokenizer(BYTES)
    assert [tokenizer.token_to_id(token) for token in SPECIALS] == list(range(256, 256 + 209))


@pytest.mark.skipif(not REAL_VOCAB.is_file(), reason="the published hy.tiktoken is not beside the checkout")
def test_the_published_file_has_the_published_ids() -> None:
    tokenizer = build_tokenizer(read_tokens(REAL_VOCAB))
    assert tokenizer.get_vocab_size() == 128166
    ids = {"<|endoftext|>": 127957, "<|startoftext|>": 127958, "<|eos|>": 127960, "<|pad|>": 127961}
    ids |= {"<|extra_0|>": 127962, "<|extra_5|>": 127967, "<|extra_203|>": 128165}
    assert {token: tokenizer.token_to_id(token) for token in ids} == ids


def test_the_byte_alphabet_is_that_of_tokenizers() -> None:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("\x00 \n~\x7f", "é\xa0ÿ", "海水", "😀"):
        written = "".join(byte_alphabet()[chr(byte)] for byte in text.encode())
        assert written == split.pre_tokenize_str(text)[0][0]
    assert len(set(byte_alphabet().values())) == 256


def test_the_small_vocabulary_is_what_its_script_makes() -> None:
    script = runpy.run_path(str(SMALL_VOCAB.with_name("make_small_vocab.py")))
    assert script["lines_of"](script["train"]()) == SMALL_VOCAB.read_text()


def damaged(text: bytes, line: int, insert: bytes | None) -> bytes:
    lines = text.splitlines(keepends=True)
    lines[line - 1 : line] = [] if insert is None else [insert]
    return b"".join(lines)


@pytest.mark.parametrize(
    ("line", "insert", "message"),
    [
        (300, None, r"line 300: the rank is 300 and should be 299"),  # a line is missing
        (300, b"YWFhYWFhYWE= 298\n", r"line 300: the rank is 298 and should be 299"),  # a rank twice
        (300, b"AA== 299\n", r"line 300: b'\\x00' has rank \d+ already"),  # a token twice
        (300, b"YWFh\n", r"line 300: b'YWFh' is not a base64 token, a space and its rank"),
        (300, b"YW!h 299\n", r"line 300: b'YW!h 299' is not a base64 token"),
        (300, b"YWFh 2x9\n", r"line 300: b'YWFh 2x9' is not a base64 token"),
        (300, b"PHxlb3N8Pg== 299\n", r"line 300: <\|eos\|> is special and must not have a rank"),
        (300, b"\x80\x81 \xff\n", r"line 300: .* is not a base64 token"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path: Path, line: int, insert: bytes | None, message: str) -> None:
    path = tmp_path / "hy.tiktoken"
    path.write_bytes(damaged(SMALL_VOCAB.read_bytes(), line, insert))
    with pytest.raises(ValueError, match=message) as error:
        read_tokens(path)
    assert str(path) in str(error.value)


def test_a_file_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "hy.tiktoken"
    whole = SMALL_VOCAB.read_bytes()
    path.write_bytes(whole[: whole.index(b" 1234\n") + 3])
    with pytest.raises(ValueError, match=r"hy.tiktoken, line 1235: the rank is 12 and should be 1234"):
        read_tokens(path)
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:100]))
    with pytest.raises(ValueError, match=r"the file ends and has no token for byte 0x"):
        read_tokens(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"the file ends and has no token for byte 0x00"):
        read_tokens(path)


def test_blank_lines_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "hy.tiktoken"
    path.write_bytes(SMALL_VOCAB.read_bytes().replace(b"\n", b"\r\n") + b"\n\n")
    assert read_tokens(path) == read_tokens(SMALL_VOCAB)
    assert read_tokens(write(path, BYTES)) == BYTES
