"""API keys by name, from a file or the environment; a changed file is read again while serving"""

import hashlib
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from hunyuan_vllm.envs import KEY_FILE_VARIABLE
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import make_private, read_private

ADMIN = "admin"  # the name whose key opens administrative routes where there are several keys
UNNAMED = "default"
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
VISIBLE = re.compile(r"[!-~]+")


def parse_keys(text: str, source: str) -> dict[str, str]:
    """Name → key. A line is `NAME KEY`, or a key alone, which is called "default"; `#` begins a line of comment."""
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name, key = (UNNAMED, words[0]) if len(words) == 1 else (words[0], words[1])
        if len(words) > 2 or not NAME.fullmatch(name) or not VISIBLE.fullmatch(key):
            raise UserError(f"{source} line {number} is neither KEY nor NAME KEY in visible ASCII")
        if name in keys:
            raise UserError(f"{source} line {number}: the name {name} is used above; give each key its own")
        if key in keys.values():
            raise UserError(f"{source} line {number}: this key is listed above under another name")
        keys[name] = key
    if not keys:
        raise UserError(f"{source} holds no key: write one into it in visible ASCII")
    return keys


def read_key_file(file: Path) -> dict[str, str]:
    text = read_private(file)
    if text is None:
        raise UserError(f"the API key file {file} does not exist")
    return parse_keys(text, f"the API key file {file}")


def create_key_file(file: Path) -> bool:
    """Write a new random key, readable by its owner alone, unless the file exists; whether it was written."""
    return make_private(file, secrets.token_urlsafe(32) + "\n")


class KeyRing:
    """The keys in force. A changed file is read again; a bad one leaves the last good keys in force.

    Attributes:
        problem: why the file as it is now was not accepted; None if it was.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Take HUNYUAN_VLLM_API_KEY_FILE, else VLLM_API_KEY."""
        self.problem: str | None = None
        self._file: Path | None = None
        self._seen: tuple[int, ...] | None = None
        if file := environ.get(KEY_FILE_VARIABLE):
            self._file = Path(file)
            self._seen = _state(self._file)
            self._use(read_key_file(self._file))
        elif key := environ.get("VLLM_API_KEY"):
            self._use({UNNAMED: key})
        else:
            raise UserError(f"an API key is required but not set: set {KEY_FILE_VARIABLE} or VLLM_API_KEY")

    def owner(self, key: bytes) -> str | None:
        """The name of `key`; None if it is not a key. Takes the same time for every key and for none."""
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
            self._use(read_key_file(self._file))
        except UserError as error:
            self.problem = str(error)
        else:
            self.problem = None
        return True

    def __len__(self) -> int:
        return len(self._digests)

    def _use(self, keys: Mapping[str, str]) -> None:
        self._digests = {name: hashlib.sha256(key.encode()).digest() for name, key in keys.items()}


def _state(file: Path) -> tuple[int, ...] | None:
    """Changes with the file's content or permissions."""
    try:
        status = file.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode)
