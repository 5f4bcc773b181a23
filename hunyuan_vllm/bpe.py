"""hy.tiktoken: its tokens and special tokens, and text to token ids by tiktoken"""

import binascii
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

END_OF_TEXT = "<|endoftext|>"
START_OF_TEXT = "<|startoftext|>"
EOS = "<|eos|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TEXT, "<|bos|>", EOS, PAD, *(f"<|extra_{i}|>" for i in range(204)))
"""In the order of their ids, which follow the last rank (in the published file: 127957 to 128165)."""
V1_SPECIAL_TOKENS = (*SPECIAL_TOKENS, "<|extra_204|>")
"""Those of Hunyuan-A13B and the dense models with hy.tiktoken."""

TOKEN_START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
"""The published pre-tokenisation pattern up to its whitespace rules, which are \\s*[\\r\\n]+|\\s+(?!\\S)|\\s+."""

# The same matches as the published rules. Oniguruma gives up (by a panic) after ten million steps back in one match;
# possessive loops take whitespace up to its last line break without stepping back through the rest.
_PATTERN = rf"{TOKEN_START}|(?:[^\S\r\n]*+[\r\n]++)++|\s+(?!\S)|\s+"


def read_tokens(path: str | Path) -> list[bytes]:
    """The tokens of a tiktoken file ("base64(token) rank" a line), each at the index of its rank.

    Raises:
        ValueError: the file is not a complete vocabulary; the message names the file and the line.
    """
    lines = Path(path).read_bytes().split(b"\n")
    tokens: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            encoded, digits = line.split()
            token, rank = binascii.a2b_base64(encoded, strict_mode=True), int(digits)
        except ValueError:
            raise _damaged(path, number, f"{line[:60]!r} is not a base64 token, a space and its rank") from None
        if rank != len(tokens):
            raise _damaged(path, number, f"the rank is {rank} and should be {len(tokens)}; no gap, no repetition")
        if token in tokens:
            raise _damaged(path, number, f"{token!r} has rank {tokens[token]} already")
        tokens[token] = rank
    for byte in range(256):
        if bytes([byte]) not in tokens:
            raise _damaged(path, len(lines), f"the file ends and has no token for byte 0x{byte:02x}")
    for special in V1_SPECIAL_TOKENS:
        if special.encode() in tokens:
            raise _damaged(path, tokens[special.encode()] + 1, f"{special} is special and must not have a rank")
    return list(tokens)


def build_tokenizer(tokens: list[bytes], special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """A `tokenizers` pipeline that encodes as tiktoken does with these ranks, after NFC.

    `tokens` is what `read_tokens` returns. Every split of a token into two tokens becomes a merge at the token's rank.
    That is exact: whatever pair the ranks choose first is the pair chosen here, because a token's bytes, merged on
    their own or inside a longer piece, always meet in the same last two parts, so no two of its merges compete.
    Tokens that no merge reaches are found as whole pieces (`ignore_merges`), as tiktoken finds them.
    """
    alphabet = str.maketrans(byte_alphabet())
    vocab = {token.decode("latin-1").translate(alphabet): rank for rank, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in vocab
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # normalized=True: special tokens are looked for after NFC. "<|eos|>" and U+0338 become "<|eos|≯", no special token.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=True) for token in special_tokens])
    return tokenizer


def byte_alphabet() -> dict[str, str]:
    """How a byte-level vocabulary writes bytes as text: Latin-1 to the character that stands for it.

    Printable Latin-1 stands for itself; the rest, in order, is written as U+0100 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return {chr(byte): chr(byte if byte in printable else next(stand_ins)) for byte in range(256)}


def _damaged(path: str | Path, line: int, what: str) -> ValueError:
    return ValueError(f"{path}, line {line}: {what}. The file is damaged; copy it from the checkpoint again")


# The same matches as the published pattern. In the group nothing looks ahead, so the regex engine runs it as one
# automaton; only whitespace before something else is left to the slower rules behind it.
_TIKTOKEN_PATTERN = rf"(?:{TOKEN_START}|\s*[\r\n]+|\s+$)|\s+(?!\S)|\s+"

_CHUNK = 1 << 16  # characters
_MAX_THREADS = 8

# Where every tokenisation has a boundary: after a line feed, and before a whitespace character other than a line break,
# if what follows is neither whitespace nor, in the second case, a special token. U+001C to U+001F are whitespace to
# `re` but not to Unicode.
_BOUNDARY = re.compile(
    r"(?<=\n)(?=[\S\x1c-\x1f])|(?=[^\S\r\n\x1c-\x1f](?!{})[\S\x1c-\x1f])".format(
        "|".join(map(re.escape, V1_SPECIAL_TOKENS))
    )
)


class TextEncoder:
    """Encodes NFC text; special tokens in it become their ids. Immutable, and safe to share between threads.

    Long text is cut at boundaries that every tokenisation has and encoded by up to 8 threads (tiktoken releases the
    interpreter lock). The cuts also keep whitespace before other text from overflowing tiktoken's matcher, which
    takes no more than about a million characters of it in one piece.
    """

    def __init__(self, tokens: list[bytes], special_tokens: Sequence[str] = SPECIAL_TOKENS) -> None:
        self._encoding = tiktoken.Encoding(
            "hunyuan",
            pat_str=_TIKTOKEN_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={token: len(tokens) + index for index, token in enumerate(special_tokens)},
        )
        self.n_vocab = len(tokens) + len(special_tokens)

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
