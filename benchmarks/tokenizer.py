"""Time of encoding long text: HYTokenizer against a slow class built as the published one is.

    python benchmarks/tokenizer.py ../shared/data/hy.tiktoken

The slow class walks the way of the published one: tiktoken to ids, ids to token bytes, token bytes to ids again, then
transformers' Python path. Also timed: the bare `tokenizers` pipeline and bare tiktoken with the published pattern.
All of them encode the same text once a round, in an order that turns round each time; a ratio is taken within a round.
HYTokenizer encodes long text on up to 8 cores, so elapsed time wants a quiet machine; the last column compares the
CPU time that all threads took together, which bears a busy one.
"""

import argparse
import logging
import os
import random
import statistics
import sysconfig
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiktoken
from transformers import PreTrainedTokenizer

from hunyuan_vllm.bpe import SPECIAL_TOKENS, START_OF_TEXT, TOKEN_START, read_tokens
from hunyuan_vllm.tokenizer import HYTokenizer

PUBLISHED_PATTERN = TOKEN_START + r"|\s*[\r\n]+|\s+(?!\S)|\s+"


class SlowTokenizer(PreTrainedTokenizer):
    """tiktoken behind transformers' Python tokenizer: tokens are bytes, looked up twice."""

    def __init__(self, encoding: tiktoken.Encoding, ids: dict[bytes | str, int], **kwargs: Any) -> None:
        self.encoding, self.ids = encoding, ids
        self.tokens = {index: token for token, index in ids.items()}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.ids)

    def get_vocab(self) -> dict[bytes | str, int]:
        return self.ids

    def tokenize(self, text: str, **kwargs: Any) -> list[bytes | str]:
        nfc = unicodedata.normalize("NFC", text)
        return [self.tokens[index] for index in self.encoding.encode(nfc, allowed_special="all")]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        if isinstance(tokens, str | bytes):
            return self.ids[tokens]
        return [self.ids[token] for token in tokens]

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: Any = None) -> list[int]:
        return [self.ids[START_OF_TEXT], *token_ids_0]


def english_and_code(characters: int) -> str:
    """Python's own library: prose in docstrings, code around it."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "".join(source.read_text(encoding="utf-8", errors="replace") for source in sources)[:characters]


def chinese(characters: int, tokens: list[bytes], seed: int = 0) -> str:
    """Clauses of words drawn from the vocabulary's Chinese tokens, with punctuation and line breaks."""
    rng = random.Random(seed)
    decoded = (token.decode("utf-8", errors="ignore") for token in tokens if len(token) >= 6)
    words = [word for word in decoded if word and all("一" <= character <= "鿿" for character in word)]
    clauses = (
        "".join(rng.choices(words, k=rng.randint(2, 6))) + rng.choice("，，，、。；：\n")
        for _ in range(characters // 4)
    )
    return "".join(clauses)[:characters]


def on_one_core(encode: Callable[[str], object]) -> Callable[[str], object]:
    def bound(text: str) -> None:
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            encode(text)
        finally:
            os.sched_setaffinity(0, cores)

    return bound


@dataclass
class Times:
    """Of one way to encode, a value a round."""

    elapsed: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def measure(ways: dict[str, Callable[[str], object]], text: str, rounds: int) -> dict[str, Times]:
    times = {name: Times() for name in ways}
    order = list(ways)
    for round_ in range(rounds + 1):
        for name in order:
            elapsed, cpu = time.perf_counter(), time.process_time()
            ways[name](text)
            if round_ > 0:  # the first one warms caches
                times[name].elapsed.append(time.perf_counter() - elapsed)
                times[name].cpu.append(time.process_time() - cpu)
        order.reverse()
    return times


def speed(slow: list[float], own: list[float]) -> str:
    ratios = [theirs / ours for theirs, ours in zip(slow, own, strict=True)]
    return f"{statistics.median(ratios):5.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


def report(title: str, text: str, tokens: int, times: dict[str, Times]) -> None:
    print(f"\n{title}: {len(text):,} characters, {tokens:,} tokens")
    print(f"{'':30}{'ms':>7}   {'speed against the slow class':30}by CPU time")
    slow = times["slow class"]
    for name, own in times.items():
        by_clock, by_cpu = speed(slow.elapsed, own.elapsed), speed(slow.cpu, own.cpu)
        print(f"{name:30}{statistics.median(own.elapsed) * 1e3:7.0f}   {by_clock:30}{by_cpu}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocab", type=Path, help="a hy.tiktoken file")
    parser.add_argument("--characters", type=int, default=2_000_000, help="length of each text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)

    tokens = read_tokens(arguments.vocab)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {token: len(tokens) + index for index, token in enumerate(SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding("published", pat_str=PUBLISHED_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    slow = SlowTokenizer(encoding, {**ranks, **special})
    begin = time.perf_counter()
    fast = HYTokenizer(vocab_file=str(arguments.vocab))
    print(f"HYTokenizer loaded in {time.perf_counter() - begin:.2f} s; {len(os.sched_getaffinity(0))} cores")

    cores = len(os.sched_getaffinity(0))
    ways: dict[str, Callable[[str], object]] = {
        "slow class": lambda text: slow(text)["input_ids"],
        f"HYTokenizer, {cores} cores": lambda text: fast(text)["input_ids"],
        "HYTokenizer, 1 core": on_one_core(lambda text: fast(text)["input_ids"]),
        "tokenizers pipeline": lambda text: fast.backend_tokenizer.encode(text).ids,
        "tiktoken, published pattern": lambda text: encoding.encode(text, allowed_special="all"),
    }
    texts = {
        "English and code": english_and_code(arguments.characters),
        "Chinese": chinese(arguments.characters, tokens),
    }
    for title, text in texts.items():
        ids = fast(text)["input_ids"]
        if not ids == slow(text)["input_ids"] == fast.backend_tokenizer.encode(text).ids:
            raise SystemExit(f"{title}: the ids differ")
        report(title, text, len(ids), measure(ways, text, arguments.rounds))


if __name__ == "__main__":
    main()
