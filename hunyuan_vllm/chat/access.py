"""Which server a chat talks to, and with which key, where the user does not say."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.server.keys import parse_keys, read_key_file
from hunyuan_vllm.server.settings import Settings, is_loopback

__all__ = ["checked_url", "default_url", "find_key", "is_this_machine"]

ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def default_url(environ: Mapping[str, str]) -> str:
    """Where `hunyuan-vllm serve` listens with the same variables set."""
    settings = Settings.read(environ)
    host = ANY_ADDRESS.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def checked_url(url: str) -> str:
    """`url`, if it is a server's address.

    Raises:
        UserError: it is not.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--url {url} is not the address of a server, as http://127.0.0.1:8020 is one")
    return url


def find_key(url: str, file: Path | None, environ: Mapping[str, str]) -> str | None:
    """The key to send: in `file`, else the environment's, else that of this machine's server; None if there is none.

    Raises:
        UserError: a file cannot be read, or others may read it.
    """
    settings = Settings.read(environ)
    if file is None and settings.api_key:
        return next(iter(parse_keys(environ["VLLM_API_KEY"], "VLLM_API_KEY").values()))
    file = file or settings.api_key_file or _made_by_serve(url, settings)
    return next(iter(read_key_file(file).values())) if file else None


def _made_by_serve(url: str, settings: Settings) -> Path | None:
    """The key file that `serve` makes. It is for the server on this machine: no other is shown that key."""
    file = settings.config_home / "hunyuan-vllm" / "api-key"
    return file if file.exists() and is_this_machine(url) else None


def is_this_machine(url: str) -> bool:
    """Whether the host of `url` is the machine this runs on."""
    host = urlsplit(url).hostname
    addresses = {address.address for interface in psutil.net_if_addrs().values() for address in interface}
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(is_loopback(address) or address in addresses for address in found)
