"""JSONL files: lines with their numbers, and why a line is not JSON."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from hunyuan_vllm.util.errors import UserError

BOM = b"\xef\xbb\xbf"
# First bytes of files that are not JSONL, what they are, and the command that converts them.
OTHER_FILES = {
    b"\x1f\x8b": ("compressed with gzip", "gunzip -k {}"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "zstd -d {}"),
    b"\xfd7zXZ": ("compressed with xz", "xz -dk {}"),
    b"PK\x03\x04": ("a zip archive", "unzip {}"),
    b"PAR1": ("a Parquet table", "pandas: read_parquet('{}').to_json('NEW.jsonl', orient='records', lines=True)"),
}
JSON_ARRAY = "; the file looks like one JSON array: write one object per line (jq -c '.[]' FILE)"


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


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file that are not blank, in order."""
    try:
        refuse_other_encodings(path)
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if line := parse_line(number, raw):
                    yield line
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def refuse_other_encodings(path: Path) -> None:
    """Refuse a compressed, Parquet, UTF-16 or UTF-32 file with one error instead of one a line."""
    with path.open("rb") as file:
        start = file.read(8)
    for mark, (kind, command) in OTHER_FILES.items():
        if start.startswith(mark):
            raise UserError(f"{path} is {kind}: write it as JSONL first, with {command.format(path)}")
    encoding = json.detect_encoding(start).removesuffix("-sig")
    if encoding != "utf-8":
        named = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")  # as iconv spells them
        raise UserError(f"{path} is {named}: convert it to UTF-8 first (iconv -f {named} -t UTF-8 {path} > NEW.jsonl)")


def parse_line(number: int, raw: bytes) -> Line | None:
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
    """The standard library's message, which is clearer than pydantic's; None where it accepts the line."""
    try:
        json.loads(raw)
    except UnicodeDecodeError as error:
        return f"{error}; a file in another encoding is converted with iconv -f GB18030 -t UTF-8, for instance"
    except ValueError as error:
        return str(error)
    return None
