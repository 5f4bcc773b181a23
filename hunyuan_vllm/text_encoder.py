"""Text to token ids by tiktoken, the fastest way there is on a CPU, in parallel where the text is long.

tiktoken searches special tokens, splits and merges like the `tokenizers` pipeline of vocab.py, with the same ids.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import tiktoken

from hunyuan_vllm.vocab import SPECIAL_TOKENS, TOKEN_START

__all__ = ["TextEncoder"]

# The same matches as the published pattern. In the group nothing looks ahead, so the regex engine runs it as one
# automaton; only whitespace before something else is left to the slower rules behind it.
_PATTERN = rf"(?:{TOKEN_START}|\s*[\r\n]+|\s+$)|\s+(?!\S)|\s+"

_CHUNK = 1 << 16  # characters
_MAX_THREADS = 8

# Where every tokenisation has a boundary: after a line feed, and before a whitespace character other than a line break,
# if what follows is neither whitespace nor, in the second case, a special token. U+001C to U+001F are whitespace to
# `re` but not to Unicode.
_BOUNDARY = re.compile(
    r"(?<=\n)(?=[\S\x1c-\x1f])|(?=[^\S\r\n\x1c-\x1f](?!{})[\S\x1c-\x1f])".format(
        "|".join(map(re.escape, SPECIAL_TOKENS))
    )
)


class TextEncoder:
    """Encodes NFC text; special tokens in it become their ids. Immutable, and safe to share between threads.

    Long text is cut at boundaries that every tokenisation has and encoded by up to 8 threads (tiktoken releases the
    interpreter lock). The cuts also keep whitespace before other text from overflowing tiktoken's matcher, which
    takes no more than about a million characters of it in one piece.
    """

    def __init__(self, tokens: list[bytes]) -> None:
        self._encoding = tiktoken.Encoding(
            "hunyuan",
            pat_str=_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={token: len(tokens) + index for index, token in enumerate(SPECIAL_TOKENS)},
        )
        self.n_vocab = len(tokens) + len(SPECIAL_TOKENS)

    def __call__(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Ids of `text`; without `special_tokens`, what looks like a special token is encoded as ordinary text."""
        encode = self._encode if special_tokens else self._encoding.encode_ordinary
        if len(text) < 2 * _CHUNK:
            return encode(text)
        chunks = list(_chunks(text))
        threads = min(_MAX_THREADS, len(chunks), len(os.sched_getaffinity(0)))
        if threads == 1:
            return list(chain.from_iterable(map(encode, chunks)))
        with ThreadPoolExecutor(threads) as pool:
            return list(chain.from_iterable(pool.map(encode, chunks)))

    def __deepcopy__(self, memo: dict[int, Any]) -> "TextEncoder":
        return self

    def _encode(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")


def _chunks(text: str) -> Iterator[str]:
    """`text` in pieces of at least `_CHUNK` characters (the last one: any), cut where each encodes by itself."""
    start = 0
    while boundary := _BOUNDARY.search(text, start + _CHUNK):
        yield text[start : boundary.start()]
        start = boundary.start()
    yield text[start:]
