"""A public key, of a host or of a user, and the fingerprint by which people compare it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

__all__ = ["FINGERPRINT", "PublicKey"]

FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
TYPES = re.compile(r"(ssh-(ed25519|rsa|dss)|ecdsa-sha2-nistp\d+|sk-[\w@.-]+)", re.ASCII)


@dataclass(frozen=True)
class PublicKey:
    """The public half of a host's or a user's key.

    Attributes:
        type: such as "ssh-ed25519".
        data: the key itself, in base64.
    """

    type: str
    data: str

    @classmethod
    def parse(cls, words: list[str]) -> PublicKey | None:
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
        """As people call it: ED25519, ECDSA, RSA."""
        return self.type.removeprefix("ssh-").removeprefix("sk-").partition("-")[0].upper()

    def __str__(self) -> str:
        return f"{self.type} {self.data}"
