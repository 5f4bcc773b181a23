"""The input file, a line at a time: read once to know what is there, and once more to run it."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from hunyuan_vllm.util.errors import UserError

__all__ = ["Index", "Line", "parse", "read_lines", "refuse_other_encodings", "scan"]

BOM = b"\xef\xbb\xbf"
# What a file that is not JSONL begins with, what it is, and how it becomes JSONL.
OTHER_FILES = {
    b"\x1f\x8b": ("compressed with gzip", "gunzip -k {}"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "zstd -d {}"),
    b"\xfd7zXZ": ("compressed with xz", "xz -dk {}"),
    b"PK\x03\x04": ("a zip archive", "unzip {}"),
    b"PAR1": ("a Parquet table", "pandas: read_parquet('{}').to_json('NEW.jsonl', orient='records', lines=True)"),
}
JSON_ARRAY = "; the file looks like one JSON array: write one object a line (jq -c '.[]' FILE)"


@dataclass(frozen=True)
class Line:
    """A line that is not blank.

    Attributes:
        number: counted from 1, blank lines included.
        given: the JSON value it holds, or its text if it holds none.
        broken: why it is not JSON; None if it is.
    """

    number: int
    given: Any
    broken: str | None = None

    @property
    def id(self) -> str | int | None:
        """What the user calls it: its custom_id or id."""
        if not isinstance(self.given, dict):
            return None
        found = self.given.get("custom_id", self.given.get("id"))
        return found if isinstance(found, str | int) else None


@dataclass(frozen=True)
class Index:
    """What an input file holds, in 8 bytes a line.

    Attributes:
        digests: at [number - 1] the digest of a line; 0 for a blank one.
        requests: lines that are not blank.
        repeated: line → the earlier line that has the same id.
    """

    digests: array[int]
    requests: int
    repeated: dict[int, int]


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of an input file, in order.

    Raises:
        UserError: it cannot be read.
    """
    try:
        refuse_other_encodings(path)
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if line := parse(number, raw):
                    yield line
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def refuse_other_encodings(path: Path) -> None:
    """Refuse a file that is not JSONL as a whole: its lines would be a thousand errors about bytes.

    Raises:
        UserError: it is compressed, or not UTF-8 but UTF-16 or -32; says the command that converts it.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(8)
    for mark, (kind, command) in OTHER_FILES.items():
        if start.startswith(mark):
            raise UserError(f"{path} is {kind}: write it as JSONL first, with {command.format(path)}")
    encoding = json.detect_encoding(start).removesuffix("-sig")
    if encoding != "utf-8":
        named = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")  # as iconv spells them
        raise UserError(f"{path} is {named}: convert it to UTF-8 first (iconv -f {named} -t UTF-8 {path} > NEW.jsonl)")


def scan(path: Path) -> Index:
    """Read the whole file once.

    Raises:
        UserError: it cannot be read, or holds no line of JSON.
    """
    digests, ids = array("Q"), array("Q")
    requests = broken = 0
    cause: str | None = None
    for line in read_lines(path):
        blank = line.number - 1 - len(digests)
        digests.extend([0] * blank)
        ids.extend([0] * blank)
        digests.append(digest(line.given))
        ids.append(0 if line.id is None else digest(str(line.id)))
        requests += 1
        if line.broken:
            broken += 1
            cause = cause or f"line {line.number}: {line.broken}"
    if not requests:
        raise UserError(f"{path} is empty: it needs one request a line")
    if broken == requests:
        raise UserError(f"{path} has no line of JSON; {cause}")
    return Index(digests, requests, _repeated(ids))


def digest(value: Any) -> int:
    """64 bits of a JSON value, never 0; equal for a value and for what is read back after writing it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) or 1


def parse(number: int, raw: bytes) -> Line | None:
    """A line as it is in the file; None if it is blank."""
    raw = (raw.removeprefix(BOM) if number == 1 else raw).strip()
    if not raw:
        return None
    try:
        return Line(number, from_json(raw, allow_inf_nan=False))
    except ValueError as error:
        hint = JSON_ARRAY if number == 1 and raw.startswith(b"[") else ""
        return Line(number, raw.decode(errors="replace"), (_why(raw) or str(error)) + hint)


def _why(raw: bytes) -> str | None:
    """The standard library's words for what is wrong, which are plainer; it is also more lenient."""
    try:
        json.loads(raw)
    except UnicodeDecodeError as error:
        return f"{error}; a file in another encoding is converted with iconv -f GB18030 -t UTF-8, for instance"
    except ValueError as error:
        return str(error)
    return None


def _repeated(ids: array[int]) -> dict[int, int]:
    """Lines whose id an earlier line has."""
    import numpy

    if not ids:
        return {}
    values = numpy.frombuffer(ids, dtype=numpy.uint64)
    first_at, inverse = numpy.unique(values, return_index=True, return_inverse=True)[1:]
    earlier = first_at[inverse]
    (later,) = numpy.nonzero((earlier != numpy.arange(len(values))) & (values != 0))
    return {int(at) + 1: int(earlier[at]) + 1 for at in later}
