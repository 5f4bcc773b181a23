"""Conversations rendered so that only the chat template's own special tokens are special; those in messages are text.

Every "<|" that a message brings is marked before rendering. The marks are taken out of the rendered text again, and a
special token that had one in it is remembered as plain. A mark is a number drawn for each rendering, so no message can
hold one.
"""

import re
import secrets
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

__all__ = ["RenderedChat", "SpecialTokens"]

SLASH = (
    "\u0338"  # behind ">" it composes to one character, so a message that begins with it would undo a token before it
)
USUAL = re.compile(r"<\|(.+)\|>")


class RenderedChat(str):
    """A rendered conversation; `plain` are the places of special tokens in it that are plain text."""

    plain: frozenset[int]

    def __new__(cls, text: str, plain: Iterable[int]) -> "RenderedChat":
        rendered = super().__new__(cls, text)
        rendered.plain = frozenset(plain)
        return rendered

    def __getitem__(self, index: SupportsIndex | slice) -> str:
        """A slice, to which vLLM cuts prompts that are far too long, keeps what is plain."""
        part = super().__getitem__(index)
        if not isinstance(index, slice):
            return part
        start, _, step = index.indices(len(self))
        return RenderedChat(part, (place - start for place in self.plain)) if step == 1 else part


class SpecialTokens:
    """The special tokens of one vocabulary, as they are looked for in text."""

    def __init__(self, tokens: Iterable[str]) -> None:
        usual = {match[1] for token in tokens if (match := USUAL.fullmatch(token))}
        others = sorted((token for token in tokens if not USUAL.fullmatch(token)), key=len, reverse=True)
        alternatives = [re.escape(token) for token in others]
        # The first character of what may be a token, or of the part of one that a template puts together.
        self._risky = re.compile("|".join([rf"<(?=\||\Z)|\A[|{SLASH}]", *(f"(?={one})." for one in alternatives)]))
        inner = "|".join(map(re.escape, sorted(usual)))
        self._token = re.compile("|".join([rf"<\|(?:{inner})\|>", *alternatives]))

    def mark(self, content: Any, mark: str) -> Any:
        """`content` (strings in lists and objects) with `mark` wherever it may bring a special token."""
        if isinstance(content, str):
            return self._risky.sub(lambda match: match[0] + mark, content)
        if isinstance(content, dict):
            return {self.mark(name, mark): self.mark(value, mark) for name, value in content.items()}
        if isinstance(content, list | tuple):
            return [self.mark(item, mark) for item in content]
        return content

    def unmark(self, text: str, mark: str) -> str:
        """A rendered text without its marks."""
        first, *others = text.split(mark)
        if not others:
            return text
        marks, length = [], len(first)
        for part in others:
            marks.append(length)
            length += len(part)
        clean = first + "".join(others)
        plain = (
            match.start()
            for match in self._token.finditer(clean)
            if bisect_right(marks, match.start()) < bisect_left(marks, match.end())
        )
        return RenderedChat(clean, plain)

    def pieces(self, text: RenderedChat) -> Iterator[tuple[str, int, bool]]:
        """(piece, its place, whether it is a special token), in order; no piece is empty."""
        end = 0
        for match in self._token.finditer(text):
            if match.start() in text.plain:
                continue
            if match.start() > end:
                yield str.__getitem__(text, slice(end, match.start())), end, False
            yield match[0], match.start(), True
            end = match.end()
        if end < len(text):
            yield str.__getitem__(text, slice(end, None)), end, False


def new_mark() -> str:
    """Digits between two code points that no text uses: template filters leave it as it is."""
    mark = f"\ufdd0{secrets.randbelow(10**24):024}\ufdd1"
    assert unicodedata.is_normalized("NFC", mark)
    return mark
