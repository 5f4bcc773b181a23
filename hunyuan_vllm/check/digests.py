"""What each file's hash should be: from SHA256SUMS, or from what the hub's client notes beside or around a download."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hunyuan_vllm.util.files import replacing

__all__ = ["SUMS_FILE", "Digest", "known_digests", "plain_files", "write_sums"]

SUMS_FILE = "SHA256SUMS"
SUMS_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
NOTES = (".cache/huggingface/download", ".huggingface/download")


@dataclass(frozen=True)
class Digest:
    """A hash in hexadecimal and who says so. 64 digits are SHA-256; 40 are Git's, which the hub has of small files."""

    value: str
    source: str

    def hasher(self, size: int) -> hashlib._Hash:
        """A fresh hash object of that kind, for a file of `size` bytes."""
        if len(self.value) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def plain_files(folder: Path) -> list[Path]:
    """The checkpoint's files: all at its top, but hidden ones and the list of sums itself."""
    files = (path for path in folder.iterdir() if path.is_file())
    return sorted(path for path in files if not path.name.startswith(".") and path.name != SUMS_FILE)


def known_digests(folder: Path) -> dict[str, Digest]:
    """File name → hash; SHA256SUMS counts most. Raises OSError if that cannot be read."""
    found: dict[str, Digest] = {}
    for path in plain_files(folder):
        if path.is_symlink() and path.resolve().parent.name == "blobs":
            _add(found, path.name, path.resolve().name, "the hub's cache")
    for notes in NOTES:
        for path in (folder / notes).glob("*.metadata"):
            lines = path.read_text(errors="replace").splitlines()
            _add(found, path.name.removesuffix(".metadata"), lines[1] if len(lines) > 1 else "", "the hub's download")
    if (folder / SUMS_FILE).exists():
        for line in (folder / SUMS_FILE).read_text(errors="replace").splitlines():
            if match := SUMS_LINE.fullmatch(line.strip()):
                _add(found, match[2], match[1], SUMS_FILE)
    return found


def write_sums(folder: Path, sums: Mapping[str, str]) -> Path:
    """Write SHA256SUMS, as `sha256sum --check` reads it."""
    target = folder / SUMS_FILE
    with replacing(target) as temporary:
        temporary.write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    return target


def _add(found: dict[str, Digest], name: str, value: str, source: str) -> None:
    value = value.strip().strip('"').lower()
    if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", value):
        found[name] = Digest(value, source)
