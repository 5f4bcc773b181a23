"""Bounds on a request's JSON values, and on the size and complexity of its grammars, schemas and lists"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, TypeGuard

from hunyuan_vllm.server.middleware.fields import Refused

# Only a body with such bytes is searched for bad values: half a surrogate pair, as an escape or in UTF-8; a long
# number, an exponent, NaN or Infinity; UTF-16 and UTF-32, which Python reads as well.
SUSPICIOUS = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|[0-9]{19}|[0-9][eE]\+?[0-9]{3}|NaN|Infinity|\0")
SURROGATE = re.compile("[\ud800-\udfff]")
MAX_FIELD = 200  # characters of a field in a message
MIN_INTEGER, INTEGER_END = -(2**63), 2**64


def read_json(body: bytes) -> object:
    """The content of a request; None if it is not JSON, which vLLM reports.

    Raises:
        Refused: a value that no field can have: nested too deeply, not finite, beyond 64 bits or invalid Unicode.
    """
    try:
        content: object = json.loads(body)
    except ValueError:
        return None
    except RecursionError:
        raise Refused(None, "the request's JSON is nested too deeply", "json") from None
    if SUSPICIOUS.search(body):
        for path, value in _leaves(content):
            if problem := _problem(value):
                field = SURROGATE.sub("\N{REPLACEMENT CHARACTER}", ".".join(path))[:MAX_FIELD] or None
                raise Refused(field, f"{field or 'the request'} {problem}", "json")
    return content


def _leaves(content: object) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every value, and every name of a field, with its path."""
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
        return "has an unpaired surrogate, which is not Unicode text"
    if isinstance(value, float) and not math.isfinite(value):
        return "is not a finite number"
    if isinstance(value, int) and not MIN_INTEGER <= value < INTEGER_END:
        return "is a number beyond 64 bits"
    return None


KIB = 2**10
GRAMMAR: Final = 16 * KIB  # characters
REGEX: Final = 8 * KIB  # characters; the patterns of one schema count together
OPTIONAL: Final = 128  # optional parts of all patterns of a schema
IN_A_ROW: Final = 64  # optional parts of one pattern or rule: compile time grows with their square or more
WIDE: Final = 16  # optional parts of one pattern or rule with as many wildcards or negated classes
REPEATED: Final = 512  # unrolled repetitions, over all different lengths
WRITTEN_OUT: Final = 128  # unrolled repetitions of one length
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
LONGEST_STRING: Final = 1024  # characters of a stop string or a bad word
MAY_BE_LEFT_OUT = re.compile(r"[?*]|\{0?,|\{0\}")
ANY_CHARACTER = re.compile(r"\[\^|\\[DSW]|(?<!\\)\.")
REPETITION = re.compile(r"\{(?:\d*,)?(\d+),?\}")


def check_bounds(request: Mapping[str, Any]) -> None:
    """Refuse a request over a bound. Fields of the wrong type are left to vLLM."""
    for name in LISTS.keys() - {"choice"}:
        _list(name, request.get(name), LISTS[name], LONGEST_STRING)
    constraint = request.get("structured_outputs")
    if isinstance(constraint, dict):
        within = "structured_outputs."
        _text(f"{within}grammar", constraint.get("grammar"), GRAMMAR)
        _rules(f"{within}grammar", constraint.get("grammar"))
        _regex(f"{within}regex", constraint.get("regex"))
        _list(f"{within}choice", constraint.get("choice"), LISTS["choice"], KIB)
        _text(f"{within}choice", "".join(filter(_is_text, _items(constraint.get("choice")))), SCHEMA)
        _schema(f"{within}json", constraint.get("json"))
        _schema(f"{within}structural_tag", constraint.get("structural_tag"))
    _schema("response_format", request.get("response_format"))
    _schema("text", request.get("text"))
    _schema("output_config", request.get("output_config"))
    tools = [_schema(f"tools.{at}", tool) for at, tool in enumerate(_items(request.get("tools")))]
    _at_most(SCHEMAS, sum(tools), "tools", "characters")


def _at_most(limit: int, count: int, field: str, what: str) -> None:
    if count > limit:
        raise Refused(field, f"{field} has {count} {what}, and this server takes at most {limit}")


def _text(field: str, text: object, limit: int) -> None:
    if isinstance(text, str):
        _at_most(limit, len(text), field, "characters")


def _regex(field: str, *patterns: object, lengths: Iterable[int] = ()) -> None:
    texts = list(filter(_is_text, patterns))
    _text(field, "".join(texts), REGEX)
    optional = sum(len(MAY_BE_LEFT_OUT.findall(text)) for text in texts)
    _at_most(OPTIONAL, optional, field, "optional parts (?, *, {0,n})")
    _rules(field, *texts, lengths=lengths)


def _rules(field: str, *patterns: object, lengths: Iterable[int] = ()) -> None:
    """Check each rule of a grammar or pattern, and the lengths of all together."""
    different: set[float] = set(lengths)
    for rule in "\n".join(filter(_is_text, patterns)).splitlines():
        optional = len(MAY_BE_LEFT_OUT.findall(rule))
        wide = min(optional, len(ANY_CHARACTER.findall(rule)))
        _at_most(IN_A_ROW, optional, field, "optional parts (?, *, {0,n}) in one pattern or rule")
        what = "optional parts in one pattern or rule with as many of any character (., [^…], \\S)"
        _at_most(WIDE, wide, field, what)
        different.update(map(float, REPETITION.findall(rule)))  # an int has at most 4300 digits
    repeated = sum(int(min(length, WRITTEN_OUT)) for length in different)
    what = f"repetitions (minLength, maxLength, {{n,m}}; each length counted once and up to {WRITTEN_OUT})"
    _at_most(REPEATED, repeated, field, what)


def _list(field: str, given: object, limit: int, longest: int) -> None:
    entries = list(given) if isinstance(given, list | dict) else []
    _at_most(limit, len(entries), field, "entries")
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
    _at_most(SCHEMA, size, field, "characters")
    _regex(field, *_patterns(schema), lengths=_lengths(schema))
    return size


def _patterns(schema: object) -> Iterator[str]:
    for inner in _objects(schema):
        if isinstance(pattern := inner.get("pattern"), str):
            yield pattern
        if isinstance(named := inner.get("patternProperties"), dict):
            yield from named
        # A structural tag may contain a grammar or a regex.
        yield from (inner[name] for name in ("regex", "grammar") if isinstance(inner.get(name), str))


def _lengths(schema: object) -> Iterator[int]:
    for inner in _objects(schema):
        yield from (inner[name] for name in ("minLength", "maxLength") if isinstance(inner.get(name), int))


def _objects(schema: object) -> Iterator[dict[str, Any]]:
    waiting = [schema]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            yield inner
            waiting.extend(inner.values())
        elif isinstance(inner, list):
            waiting.extend(inner)


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str)
