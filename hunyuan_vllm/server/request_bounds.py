"""Bounds on what a request asks the engine to prepare: grammars, schemas, lists of words and tokens.

A grammar's compilation takes the processors that the engine computes on, for everybody, and cannot be ended. With the
demo model's vocabulary the worst that was found under these bounds (chains of rules, sequences of optional parts,
nested schemas) takes about half a second of one core; a larger vocabulary takes longer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeGuard

from hunyuan_vllm.server.request_fields import BadField

__all__ = ["check_bounds"]

KIB = 2**10
GRAMMAR: Final = 16 * KIB  # characters
REGEX: Final = 8 * KIB  # characters; the patterns of one schema count together
OPTIONAL: Final = 128  # parts of a regex that may be left out: the time grows with their square
SCHEMA: Final = 64 * KIB  # characters of one schema, as JSON without white space
SCHEMAS: Final = 256 * KIB  # of all tools together
LISTS: Final = {  # entries
    "stop": 64,
    "stop_sequences": 64,
    "stop_token_ids": 1024,
    "bad_words": 1024,
    "logit_bias": 1024,
    "choice": 1024,
}
LONGEST: Final = 1024  # characters of a stop string or a bad word
MAY_BE_LEFT_OUT = re.compile(r"[?*]|\{0?,|\{0\}")


def check_bounds(request: Mapping[str, Any]) -> None:
    """Refuse a request over a bound; a field of the wrong type is left to vLLM.

    Raises:
        BadField: with the field's name and the bound.
    """
    for name in LISTS.keys() - {"choice"}:
        _list(name, request.get(name), LISTS[name], LONGEST)
    constraint = request.get("structured_outputs")
    if isinstance(constraint, dict):
        within = "structured_outputs."
        _text(f"{within}grammar", constraint.get("grammar"), GRAMMAR)
        _regex(f"{within}regex", constraint.get("regex"))
        _list(f"{within}choice", constraint.get("choice"), LISTS["choice"], KIB)
        _text(f"{within}choice", "".join(filter(_is_text, _items(constraint.get("choice")))), SCHEMA)
        _schema(f"{within}json", constraint.get("json"))
        _schema(f"{within}structural_tag", constraint.get("structural_tag"))
    _schema("response_format", request.get("response_format"))
    _schema("text", request.get("text"))
    _schema("output_config", request.get("output_config"))
    tools = [_schema(f"tools.{at}", tool) for at, tool in enumerate(_items(request.get("tools")))]
    if sum(tools) > SCHEMAS:
        raise BadField("tools", f"tools have {sum(tools)} characters, and this server takes at most {SCHEMAS}")


def _text(field: str, text: object, most: int) -> None:
    if isinstance(text, str) and len(text) > most:
        raise BadField(field, f"{field} has {len(text)} characters, and this server takes at most {most}")


def _regex(field: str, *patterns: object) -> None:
    text = "".join(filter(_is_text, patterns))
    _text(field, text, REGEX)
    optional = len(MAY_BE_LEFT_OUT.findall(text))
    if optional > OPTIONAL:
        raise BadField(
            field, f"{field} has {optional} optional parts (?, *, {{0,n}}), and this server takes at most {OPTIONAL}"
        )


def _list(field: str, given: object, most: int, longest: int) -> None:
    entries = list(given) if isinstance(given, list | dict) else []
    if len(entries) > most:
        raise BadField(field, f"{field} has {len(entries)} entries, and this server takes at most {most}")
    for entry in entries:
        _text(field, entry, longest)


def _schema(field: str, schema: object) -> int:
    """Check a schema, as text or as an object, and return its characters."""
    if isinstance(schema, str):
        _text(field, schema, SCHEMA)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            return len(str(schema))
    if not isinstance(schema, dict):
        return 0
    size = len(json.dumps(schema, ensure_ascii=False, separators=(",", ":")))
    if size > SCHEMA:
        raise BadField(field, f"{field} has {size} characters, and this server takes at most {SCHEMA}")
    _regex(field, *_patterns(schema))
    return size


def _patterns(schema: object) -> Iterator[str]:
    waiting = [schema]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            if isinstance(pattern := inner.get("pattern"), str):
                yield pattern
            if isinstance(named := inner.get("patternProperties"), dict):
                yield from named
            # A structural tag may hold a grammar or a regex of its own.
            yield from (inner[name] for name in ("regex", "grammar") if isinstance(inner.get(name), str))
            waiting.extend(inner.values())
        elif isinstance(inner, list):
            waiting.extend(inner)


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str)
