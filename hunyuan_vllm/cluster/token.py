"""Ray's token: it allows anyone to join the cluster and run anything there, so it is made once and kept private"""

import secrets
from collections.abc import Mapping
from pathlib import Path

from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import make_private, read_private

PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"
BYTES = 32


def token_file(environ: Mapping[str, str], home: Path) -> Path:
    """Where Ray looks for it: RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token."""
    named = environ.get(PATH_VARIABLE, "").strip()
    return Path(named).expanduser().absolute() if named else home / ".ray" / "auth_token"


def read_token(file: Path) -> str | None:
    text = read_private(file)
    if text is None:
        return None
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{file} holds no token: delete it, and the next start makes one")
    return token


def make_token(file: Path) -> str:
    """The token in `file`, made if there is none."""
    make_private(file, secrets.token_hex(BYTES))
    token = read_token(file)
    assert token is not None
    return token
