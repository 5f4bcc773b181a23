"""The text of a `known_hosts` file: which keys it has for a host, and the same text with others pinned."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from hunyuan_vllm.cluster.public_key import PublicKey

__all__ = ["keys_of", "pin", "read_known_hosts", "revoked_keys_of"]

GLOBAL_FILE = Path("/etc/ssh/ssh_known_hosts")


def read_known_hosts(home: Path) -> str:
    """What a user of this machine knows: the user's own file, and the machine's."""
    texts = []
    for file in (home / ".ssh" / "known_hosts", GLOBAL_FILE):
        try:
            texts.append(file.read_text(errors="surrogateescape"))
        except OSError:
            continue  # there is none, or it is no one's to read
    return "\n".join(texts)


def keys_of(text: str, name: str) -> list[PublicKey]:
    """The keys that `text` has for a host.

    Args:
        name: as `Host.known_hosts_name` gives it. Hashed entries and patterns are understood; lines with a marker
            (certificate authorities, revoked keys) give no key.
    """
    return _keys((line.split() for line in text.splitlines()), name)


def revoked_keys_of(text: str, name: str) -> list[PublicKey]:
    """The keys that `text` forbids for a host."""
    words = (line.split() for line in text.splitlines())
    return _keys((line[1:] for line in words if line[:1] == ["@revoked"]), name)


def _keys(lines: Iterable[list[str]], name: str) -> list[PublicKey]:
    found = [PublicKey.parse(words[1:]) for words in lines if len(words) >= 3 and _names(words[0], name)]
    return [key for key in found if key is not None]


def pin(text: str, keys: Mapping[str, PublicKey], replace: Iterable[str] = ()) -> str:
    """`text` with a line for each key that it has not yet; everything else stays byte for byte.

    Args:
        keys: known_hosts name → key.
        replace: names whose other keys go.
    """
    outdated = set(replace)
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if not any(_is_outdated(line, name, keys[name]) for name in outdated)]
    text = "".join(kept)
    missing = [f"{name} {key}\n" for name, key in keys.items() if key not in keys_of(text, name)]
    if missing and text and not text.endswith("\n"):
        text += "\n"
    return text + "".join(missing)


def _is_outdated(line: str, name: str, key: PublicKey) -> bool:
    """Whether a line pins another key for `name`; one with wildcards stays, for it speaks of other hosts too."""
    old = keys_of(line, name)
    return bool(old) and key not in old and not set("*?") & set(line.split()[0])


def _names(field: str, name: str) -> bool:
    """Whether the names of a line (its first field; a marker is no name) stand for the host `name`."""
    if field.startswith("|"):
        return _is_hash_of(field, name)
    patterns = field.lower().split(",")
    if any(_matches(pattern[1:], name) for pattern in patterns if pattern.startswith("!")):
        return False
    return any(_matches(pattern, name) for pattern in patterns)


def _matches(pattern: str, name: str) -> bool:
    # In these patterns only * and ? are special, and brackets belong to names.
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))


def _is_hash_of(field: str, name: str) -> bool:
    """As `ssh-keygen -H` writes it: |1|salt|HMAC-SHA1 of the name|."""
    try:
        _, version, salt, digest = field.split("|")
        given = base64.b64decode(digest)
        expected = hmac.digest(base64.b64decode(salt), name.encode(), hashlib.sha1)
    except (ValueError, binascii.Error):
        return False
    return version == "1" and hmac.compare_digest(given, expected)
