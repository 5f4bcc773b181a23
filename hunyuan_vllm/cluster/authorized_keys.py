"""The text of an `authorized_keys` file with keys added that it lacks."""

from __future__ import annotations

from collections.abc import Iterable

from hunyuan_vllm.cluster.public_key import PublicKey

__all__ = ["admit"]


def admit(text: str, lines: Iterable[str]) -> str:
    """`text` with the public keys in `lines` (type, data, comment) let in; everything else stays byte for byte.

    A key that stands there with options, such as `from="10.0.0.0/8"`, is there: whoever wrote them meant them.
    """
    for line in lines:
        key = PublicKey.parse(line.split())
        if key is None:
            raise ValueError(f"not a public key: {line!r}")
        if not any(key.data in entry.split() for entry in text.splitlines() if not entry.lstrip().startswith("#")):
            text = text if not text or text.endswith("\n") else text + "\n"
            text += line.strip() + "\n"
    return text
