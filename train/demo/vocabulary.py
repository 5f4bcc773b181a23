"""The demo model's vocabulary: byte-pair ranks learned from the corpus, written as hy.tiktoken.

`python train/demo/vocabulary.py` writes hunyuan_vllm/demo/hy.tiktoken anew (it is committed; training only reads it).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Final

from corpus.dialogue import Corpus, texts
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from hunyuan_vllm.bpe import TOKEN_START

__all__ = ["RANKS", "VOCABULARY_FILE", "learn_ranks", "write_ranks"]

PATTERN: Final = rf"{TOKEN_START}|\s*[\r\n]+|\s+(?!\S)|\s+"
RANKS: Final = 1800
EXAMPLES: Final = 30_000
VOCABULARY_FILE: Final = Path(__file__).parents[2] / "hunyuan_vllm" / "demo" / "hy.tiktoken"


def learn_ranks(corpus_texts: Iterable[str], size: int = RANKS) -> list[bytes]:
    """Tokens in order of rank: the 256 bytes, then merges.

    Chinese characters are kept apart while merges are learned, so each becomes one token and no phrase is frozen into
    one: a question put in other words still has the same tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus_texts, trainer)
    by_rank = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    to_byte = _byte_of_character()
    tokens = [bytes(to_byte[character] for character in token) for token in by_rank]
    return sorted(token for token in tokens if len(token) == 1) + [token for token in tokens if len(token) > 1]


def write_ranks(tokens: list[bytes], path: Path) -> None:
    """Write `base64(token) rank` lines, beside the file first."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines), encoding="ascii")
    os.replace(partial, path)


def _byte_of_character() -> dict[str, int]:
    """Inverse of the byte-level alphabet: printable Latin-1 stands for itself, the other bytes follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


def corpus_texts(seed: int = 1, examples: int = EXAMPLES) -> Iterable[str]:
    """Texts of training examples."""
    rng, corpus = Random(seed), Corpus()
    return (text for _ in range(examples) for text in texts(corpus.example(rng)))


def main() -> None:
    """Learn the ranks and write the file."""
    VOCABULARY_FILE.parent.mkdir(exist_ok=True)
    write_ranks(learn_ranks(corpus_texts()), VOCABULARY_FILE)
    print(f"{VOCABULARY_FILE}: {RANKS} ranks")


if __name__ == "__main__":
    main()
