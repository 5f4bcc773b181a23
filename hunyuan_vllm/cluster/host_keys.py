"""Host keys and public keys: known_hosts, authorized_keys, and which host key is trusted"""

import base64
import binascii
import fnmatch
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from paramiko import HostKeys

from hunyuan_vllm.cluster.hosts import Host, HostError
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.net import normalise_address

FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
TYPES = re.compile(r"(ssh-(ed25519|rsa|dss)|ecdsa-sha2-nistp\d+|sk-[\w@.-]+)", re.ASCII)


@dataclass(frozen=True)
class PublicKey:
    """The public half of a host's or a user's key."""

    type: str
    data: str

    @classmethod
    def parse(cls, words: list[str]) -> Self | None:
        """The key that starts a list of words (type, data, comment …), or None where none does."""
        if len(words) < 2 or not TYPES.fullmatch(words[0]):
            return None
        try:
            base64.b64decode(words[1], validate=True)
        except binascii.Error:
            return None
        return cls(words[0], words[1])

    @property
    def fingerprint(self) -> str:
        """As OpenSSH shows it: SHA256: and the unpadded base64 of the digest."""
        digest = hashlib.sha256(base64.b64decode(self.data)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    @property
    def kind(self) -> str:
        """Such as ED25519, ECDSA, RSA."""
        return self.type.removeprefix("ssh-").removeprefix("sk-").partition("-")[0].upper()

    def __str__(self) -> str:
        return f"{self.type} {self.data}"


def authorize(text: str, lines: Iterable[str]) -> str:
    """`text` of an authorized_keys file with the keys in `lines` (type, data, comment) added; the rest is unchanged.

    A key that is there with options, such as `from="10.0.0.0/8"`, is left as it is.
    """
    for line in lines:
        key = PublicKey.parse(line.split())
        if key is None:
            raise ValueError(f"not a public key: {line!r}")
        if not any(key.data in entry.split() for entry in text.splitlines() if not entry.lstrip().startswith("#")):
            text = text if not text or text.endswith("\n") else text + "\n"
            text += line.strip() + "\n"
    return text


GLOBAL_FILE = Path("/etc/ssh/ssh_known_hosts")


def read_known_hosts(home: Path) -> str:
    texts = []
    for file in (home / ".ssh" / "known_hosts", GLOBAL_FILE):
        try:
            texts.append(file.read_text(errors="surrogateescape"))
        except OSError:
            continue  # there is none, or this user may not read it
    return "\n".join(texts)


def keys_of(text: str, name: str, marker: str | None = None) -> list[PublicKey]:
    """The keys that `text` has for a host.

    Args:
        name: as `Host.known_hosts_name` gives it. Hashed entries and patterns are understood.
        marker: take only lines with this one, such as @revoked; without, only those that have none.
    """
    lines = [line.split() for line in text.splitlines()]
    if marker:
        lines = [words[1:] for words in lines if words[:1] == [marker]]
    found = [PublicKey.parse(words[1:]) for words in lines if len(words) >= 3 and _names(words[0], name)]
    return [key for key in found if key is not None]


def pin(text: str, keys: Mapping[str, PublicKey], replace: Iterable[str] = ()) -> str:
    """`text` with a line for each key that is missing; everything else is unchanged.

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
    """Whether the names of a line (its first field; a marker is not a name) stand for the host `name`."""
    if field.startswith("|"):
        try:
            return HostKeys.hash_host(name, field) == field
        except (IndexError, AssertionError, binascii.Error):
            return False
    patterns = field.lower().split(",")
    if any(_matches(pattern[1:], name) for pattern in patterns if pattern.startswith("!")):
        return False
    return any(_matches(pattern, name) for pattern in patterns)


def _matches(pattern: str, name: str) -> bool:
    # In these patterns only * and ? are special, and brackets belong to names.
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))


class Trust(StrEnum):
    """Why a host key is trusted."""

    KNOWN = "known before"
    GIVEN = "fingerprint given"
    CONFIRMED = "confirmed by you"


def parse_fingerprints(text: str | None, hosts: Iterable[Host]) -> dict[str, frozenset[str]]:
    """Host name → fingerprints of its keys, from `HOST=SHA256:…,HOST=SHA256:…` or a file with `HOST SHA256:…` lines.

    A file may name other hosts too; on the command line that is a mistake.
    """
    if not text or not text.strip():
        return {}
    from_file = "=" not in text
    entries = _read(Path(text)) if from_file else re.split(r"[\s,]+", text.strip())
    names = {host.name for host in hosts}
    given: dict[str, frozenset[str]] = {}
    for entry in filter(None, entries):
        word, _, fingerprint = re.sub(r"\s+", "=", entry.strip()).partition("=")
        if not FINGERPRINT.fullmatch(fingerprint):
            raise UserError(
                f"--fingerprints: {entry!r} is not HOST=SHA256:… with the 43 characters that "
                "`ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` shows on the host"
            )
        name = normalise_address(word)
        if name in names:
            given[name] = given.get(name, frozenset()) | {fingerprint}
        elif not from_file:
            raise UserError(f"--fingerprints names {word}, which is not among the hosts of --ips")
    return given


def _read(file: Path) -> list[str]:
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"--fingerprints: cannot read the file {file}: {reason}") from None
    return [line for line in lines if not line.lstrip().startswith("#")]


def verify_host_key(
    host: Host, key: PublicKey, known_hosts: str, fingerprints: Mapping[str, frozenset[str]]
) -> Trust | None:
    """Why `key` is trusted to be the host's; None where a person must confirm it."""
    if key in keys_of(known_hosts, host.known_hosts_name, "@revoked"):
        raise HostError(f"its host key is revoked: {key.fingerprint}", "give the host a new key (ssh-keygen -A)")
    shown = f"{key.kind} {key.fingerprint}"
    if host.name in fingerprints:
        if key.fingerprint in fingerprints[host.name]:
            return Trust.GIVEN
        raise HostError(
            f"its host key is not the one of --fingerprints: it presents {shown}",
            "compare at its console (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub); if that differs too, something "
            "else answers at this address",
        )
    known = keys_of(known_hosts, host.known_hosts_name)
    if key in known:
        return Trust.KNOWN
    if known:
        raise HostError(
            f"its host key changed: it presents {shown}, known is {known[0].kind} {known[0].fingerprint}",
            "if the host was reinstalled, compare at its console and run again with --fingerprints "
            f"{host}=SHA256:…, which replaces the old key everywhere; if not, something else answers in its place",
        )
    return None
