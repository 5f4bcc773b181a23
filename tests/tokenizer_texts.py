"""Vocabularies and strings for the tokenizer tests, and what tiktoken makes of the strings."""

import base64
import itertools
import random
import unicodedata
from pathlib import Path

import pytest
import tiktoken

SMALL_VOCAB = Path(__file__).parent / "data" / "small.tiktoken"
REAL_VOCAB = Path(__file__).parents[2] / "shared" / "data" / "hy.tiktoken"
VOCABS = [
    pytest.param(SMALL_VOCAB, id="small"),
    pytest.param(
        REAL_VOCAB,
        id="published",
        marks=pytest.mark.skipif(
            not REAL_VOCAB.is_file(), reason="the published hy.tiktoken is not beside the checkout"
        ),
    ),
]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"]
SPECIALS += [f"<|extra_{index}|>" for index in range(204)]

WHITESPACE = "\t\n\x0b\x0c\r \x1c\x1f\x85\xa0\u1680\u2000\u2028\u2029\u202f\u205f\u3000\u180e\u200b\ufeff"
BREAKS = ["\r\n", "\n\n", "\n \n", " \n", "\t\n", "\n\t", "   ", "  "]
ALMOST_SPECIAL = [*SPECIALS[:8], "<|", "|>", "<|eos|", "<|eos|>\u0338", "<|extra_1", "0|>", "<|extra_204|>", "<|EOS|>"]
CONTRACTIONS = "'s 'S 'ſ 't 'T 're 'RE 'Ve 'll 'lL 'd 'm 'Mm 'st 'ﬆ 'ﬅ 'ŉ 'ß 'K ’s 'İ '".split()
WORDS = """
water salty because ocean don't it's HELLO Straße naïve fiancée
İstanbul ﬁne 为什么 海水 是咸的 四大洋 面积 排名 機械学習 ひらがな カタカナ 한국어 대한민국 Москва ёж
ελληνικά ὀδός עִבְרִית العَرَبِيَّة हिन्दी ไทยภาษา தமிழ் မြန်မာ ខ្មែរ
ལྷ་ས ꦗꦮ Việt x=1; ->{}[]() 3.14159 ½ ⅷ ٣٤ 四百 1e-5 http://a.b/c?d=e&f=g
ａｂｃ ﷺ ﬀ Ⅷ ㍿ ™ § ¿¡ … — “ ”
""".split()
EMOJI = "😀 👍🏽 👩‍🚀 👨‍👩‍👧‍👦 🇨🇳 🏴󠁧󠁢󠁷󠁬󠁳󠁿 ❤️ ☕ 🧑🏿‍🤝‍🧑🏻 1️⃣ 🌊🌊".split()
MARKS = [chr(code) for code in range(0x20000) if unicodedata.combining(chr(code))]


SPLIT_ALPHABET = " \n\r\t\xa0'sſLl1!a水\u0301\x1c"
"""Characters that the pattern tells apart, and that it treats alike only in some places."""


def telling_tokens() -> list[bytes]:
    """A vocabulary in which a piece cut elsewhere shows: it merges almost any two or three neighbours of the above."""
    runs = ("".join(run) for size in (2, 3) for run in itertools.product(SPLIT_ALPHABET, repeat=size))
    characters = [character.encode() for character in SPLIT_ALPHABET if not character.isascii()]
    prefixes = {character[:size] for character in characters for size in range(2, len(character) + 1)}
    return list(
        dict.fromkeys([*(bytes([byte]) for byte in range(256)), *sorted(prefixes), *(run.encode() for run in runs)])
    )


def telling_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(SPLIT_ALPHABET, k=rng.randint(2, 14))) for _ in range(count)]


def reference_of(tokens: list[bytes]) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {token: len(tokens) + index for index, token in enumerate(SPECIALS)}
    return tiktoken.Encoding("reference", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def reference(vocab: Path) -> tiktoken.Encoding:
    """tiktoken with the published pattern and special tokens, reading the file by itself."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, vocab.read_text().splitlines())}
    return reference_of(sorted(ranks, key=ranks.__getitem__))


def expected_ids(encoding: tiktoken.Encoding, text: str) -> list[int]:
    well_formed = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return encoding.encode(unicodedata.normalize("NFC", well_formed), allowed_special="all")


def random_texts(count: int, seed: int) -> list[str]:
    """Strings of one to twelve parts of every kind: see `_part`."""
    rng = random.Random(seed)
    return ["".join(_part(rng) for _ in range(rng.randint(1, 12))) for _ in range(count)]


def _part(rng: random.Random) -> str:
    kind = rng.randrange(14)
    if kind == 0:
        return rng.choice(WHITESPACE) * rng.choice((1, 1, 2, 3, 9))
    if kind == 1:
        return "".join(rng.choices(WHITESPACE, k=rng.randint(1, 7)))
    if kind == 2:
        return rng.choice(BREAKS)
    if kind == 3:
        return rng.choice(ALMOST_SPECIAL)
    if kind == 4:
        return rng.choice(CONTRACTIONS)
    if kind in (5, 6):
        return rng.choice(WORDS) + rng.choice(("", " "))
    if kind == 7:
        return rng.choice(EMOJI)
    if kind == 8:  # marks to reorder and compose
        return rng.choice("aeioAOnq가ऒཀ<>=") + "".join(rng.choices(MARKS, k=rng.randint(1, 4)))
    if kind == 9:  # Hangul by its parts
        return "".join(chr(rng.randrange(0x1100, 0x1200)) for _ in range(rng.randint(1, 4)))
    if kind == 10:  # anything, lone surrogates and unassigned code points included
        return chr(rng.choice((rng.randrange(0x250), rng.randrange(0x10000), rng.randrange(0x110000))))
    if kind == 11:
        return chr(rng.randrange(0x250)) * rng.choice((2, 5, 40))
    if kind == 12:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ", k=rng.randint(1, 12)))
    return "".join(rng.choices("!@#$%^&*()-_=+[]{};:,.<>/?|\\`~\"'", k=rng.randint(1, 5)))
