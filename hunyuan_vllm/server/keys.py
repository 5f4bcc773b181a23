"""API keys by name, from a file or the environment; a file that has changed is read again while serving."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from hunyuan_vllm.settings import KEY_FILE_VARIABLE
from hunyuan_vllm.util.errors import UserError

__all__ = ["ADMIN", "UNNAMED", "KeyRing", "create_key_file", "parse_keys", "read_key_file"]

ADMIN = "admin"  # the name whose key opens administrative routes where there are several keys
UNNAMED = "default"
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
VISIBLE = re.compile(r"[!-~]+")


def parse_keys(text: str, source: str) -> dict[str, str]:
    """Name → key. A line is `NAME KEY`, or a key alone, which is called "default"; `#` begins a line of comment.

    Args:
        source: where the text is from, for messages.

    Raises:
        UserError: there is no key, or a line is something else. The message shows no key.
    """
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name, key = (UNNAMED, words[0]) if len(words) == 1 else (words[0], words[1])
        if len(words) > 2 or not NAME.fullmatch(name) or not VISIBLE.fullmatch(key):
            raise UserError(f"{source} line {number} is neither a key nor a name and a key, in visible ASCII")
        if name in keys:
            raise UserError(f"{source} line {number}: there is a key called {name} before; give each a name of its own")
        if key in keys.values():
            raise UserError(f"{source} line {number}: that key has another name before")
        keys[name] = key
    if not keys:
        raise UserError(f"{source} holds no key: write one into it, in visible ASCII")
    return keys


def read_key_file(file: Path) -> dict[str, str]:
    """Name → key, from a file.

    Raises:
        UserError: it is absent, open to other users, or holds no keys.
    """
    try:
        status = file.stat()
        text = file.read_text(errors="replace")
    except OSError as error:
        raise UserError(f"the API key file {file} cannot be read: {error.strerror}") from None
    # As ssh has it: one's own file must be private; a secret that the system mounts belongs to another user.
    if status.st_uid == os.geteuid() and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"the API key file {file} is open to other users: chmod 600 {file}")
    return parse_keys(text, f"the API key file {file}")


def create_key_file(file: Path) -> None:
    """Write a new random key, readable by its owner alone; a file that is there is left as it is."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as output:
        output.write(secrets.token_urlsafe(32) + "\n")
    try:
        os.link(beside, file)
    except FileExistsError:
        pass
    finally:
        beside.unlink()


class KeyRing:
    """The keys in force. Those of a file are read again when it has changed; a bad file leaves the last good ones.

    Attributes:
        problem: why the file as it is now was not taken; None if it was.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Take HUNYUAN_VLLM_API_KEY_FILE, else VLLM_API_KEY.

        Raises:
            UserError: neither is set, or the file is not one of keys.
        """
        self.problem: str | None = None
        self._file: Path | None = None
        self._seen: tuple[int, ...] | None = None
        if file := environ.get(KEY_FILE_VARIABLE):
            self._file = Path(file)
            self._seen = _state(self._file)
            self._take(read_key_file(self._file))
        elif key := environ.get("VLLM_API_KEY"):
            self._take({UNNAMED: key})
        else:
            raise UserError(f"an API key is required and there is none: set {KEY_FILE_VARIABLE} or VLLM_API_KEY")

    def owner(self, key: bytes) -> str | None:
        """The name of `key`; None if it is no key. Takes the same time for every key and for none."""
        digest, found = hashlib.sha256(key).digest(), None
        for name, known in self._digests.items():
            if secrets.compare_digest(digest, known):
                found = name
        return found

    def may_administrate(self, name: str) -> bool:
        """Whether the key of that name opens administrative routes: the only key, or the one called "admin"."""
        return name == ADMIN or len(self._digests) == 1

    def refresh(self) -> bool:
        """Read the file again if it has changed since it was last looked at; True if it was read."""
        if self._file is None or (state := _state(self._file)) == self._seen:
            return False
        self._seen = state
        try:
            self._take(read_key_file(self._file))
        except UserError as error:
            self.problem = str(error)
        else:
            self.problem = None
        return True

    def __len__(self) -> int:
        return len(self._digests)

    def _take(self, keys: Mapping[str, str]) -> None:
        self._digests = {name: hashlib.sha256(key.encode()).digest() for name, key in keys.items()}


def _state(file: Path) -> tuple[int, ...] | None:
    """What changes with a file's content or permissions."""
    try:
        status = file.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode)
