"""What JSON can spell and no field can mean: text that is no Unicode, numbers beyond 64 bits, endless nesting.

vLLM's models take such values; what comes after them (tokenizer, log, the way to the engine) fails on them with a 500.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

__all__ = ["BadJson", "read_json"]

# Bytes without which there is nothing to look for: half a surrogate pair, as an escape or in UTF-8; a long number, an
# exponent, NaN or Infinity; UTF-16 and UTF-32, which Python reads as well.
SUSPICIOUS = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|[0-9]{19}|[0-9][eE]\+?[0-9]{3}|NaN|Infinity|\0")
SURROGATE = re.compile("[\ud800-\udfff]")
LONGEST = 200  # characters of a place that is named
LEAST, BEYOND = -(2**63), 2**64


class BadJson(Exception):
    """`field` is where, as in "messages.0.content"; None for the whole."""

    def __init__(self, field: str | None, message: str) -> None:
        super().__init__(message)
        self.field, self.message = field, message


def read_json(body: bytes) -> object:
    """The content of a request; None where it is no JSON, which vLLM says.

    Raises:
        BadJson: there is something in it that no field can mean.
    """
    try:
        content: object = json.loads(body)
    except ValueError:
        return None
    except RecursionError:
        raise BadJson(None, "the request's JSON is nested too deeply") from None
    if SUSPICIOUS.search(body):
        for path, value in _leaves(content):
            if problem := _problem(value):
                field = SURROGATE.sub("\N{REPLACEMENT CHARACTER}", ".".join(path))[:LONGEST] or None
                raise BadJson(field, f"{field or 'the request'} {problem}")
    return content


def _leaves(content: object) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every value, and every name of a field."""
    waiting: list[tuple[tuple[str, ...], object]] = [((), content)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            yield from ((path, name) for name in value)
            waiting.extend(((*path, name), inner) for name, inner in value.items())
        elif isinstance(value, list):
            waiting.extend(((*path, str(index)), inner) for index, inner in enumerate(value))
        else:
            yield path, value


def _problem(value: object) -> str | None:
    if isinstance(value, str) and SURROGATE.search(value):
        return "has half of a surrogate pair, which is no Unicode text"
    if isinstance(value, float) and not math.isfinite(value):
        return "is no finite number"
    if isinstance(value, int) and not LEAST <= value < BEYOND:
        return "is a number beyond 64 bits"
    return None
