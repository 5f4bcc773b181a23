"""A client's view of a running server: address, API key, model"""

import json
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from hunyuan_vllm.envs import Settings
from hunyuan_vllm.server.keys import parse_keys, read_key_file
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.net import host_port, is_loopback, local_address, own_addresses

TIMEOUT = 30  # seconds


@dataclass(frozen=True)
class ServedModel:
    """One model of a running server.

    Attributes:
        url: the server's, without a path, as in http://127.0.0.1:8020.
        context: maximum tokens of a prompt and its answer, if known.
        authority: CA certificates to trust instead of the system's.
    """

    url: str
    name: str
    context: int | None
    root: str
    key: str | None = field(default=None, repr=False)
    authority: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """Folder of the model's tokenizer: the server's checkpoint, if this machine has it."""
        if self.root and Path(self.root).is_dir():
            return Path(self.root)
        raise UserError(
            f"the server's checkpoint {self.root} is not on this machine: name a folder with its tokenizer "
            "(hy.tiktoken, tokenizer_config.json, config.json) with --tokenizer"
        )

    def read(self, path: str) -> str:
        """The text of a page of the server, such as /metrics."""
        return _get(self.url + path, self.key, self.authority)


def connect(url: str, key: str | None, name: str | None = None, authority: Path | None = None) -> ServedModel:
    """Ask a server for its model called `name`, or its first."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--url {url} is not the address of a server: use the form http://127.0.0.1:8020")
    base = url.rstrip("/").removesuffix("/v1")
    try:
        cards: dict[str, dict[str, Any]] = {
            card["id"]: card for card in json.loads(_get(f"{base}/v1/models", key, authority))["data"]
        }
        chosen = name or next(iter(cards))
    except (ValueError, KeyError, TypeError, StopIteration):
        raise UserError(f"the server at {base} is not OpenAI-compatible: GET /v1/models lists no model") from None
    if chosen not in cards:
        raise UserError(f"the server has no model {chosen}: it has {', '.join(cards)}")
    card = cards[chosen]
    return ServedModel(base, chosen, card.get("max_model_len"), str(card.get("root") or ""), key, authority)


def _get(url: str, key: str | None, authority: Path | None) -> str:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        trusted = ssl.create_default_context(cafile=authority)
    except OSError as error:  # ssl's own errors among them
        raise UserError(f"--ca {authority} holds no certificates: {error.strerror or error}") from None
    try:
        response = httpx.get(url, headers=headers, timeout=TIMEOUT, verify=trusted, trust_env=False)
    except httpx.TransportError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise UserError(f"the certificate of {url} is not trusted: name its authority's file with --ca") from None
        raise UserError(
            f"no server answers at {url} ({error}): start one with `hunyuan-vllm serve`, or name another with --url"
        ) from None
    if response.status_code == HTTPStatus.UNAUTHORIZED:
        problem = "does not accept this API key" if key else "asks for an API key"
        raise UserError(f"{url} {problem}: set VLLM_API_KEY, or name a file that holds it with --key-file")
    if response.is_error:
        raise UserError(f"{url} answered {response.status_code}: {response.text[:200]}")
    return response.text


def default_url(environ: Mapping[str, str]) -> str:
    """Where `hunyuan-vllm serve` listens with the same variables set."""
    settings = Settings.read(environ)
    return f"http://{host_port(local_address(settings.host), settings.port)}"


def find_key(url: str, file: Path | None, environ: Mapping[str, str]) -> str | None:
    """The key to send: from `file`, else from the environment, else that of this machine's server; None without one."""
    settings = Settings.read(environ)
    if file is None and settings.api_key:
        return next(iter(parse_keys(environ["VLLM_API_KEY"], "VLLM_API_KEY").values()))
    file = file or settings.api_key_file or _made_by_serve(url, settings)
    return next(iter(read_key_file(file).values())) if file else None


def _made_by_serve(url: str, settings: Settings) -> Path | None:
    """The key file that `serve` creates; its key is sent only to a server on this machine."""
    file = settings.config_home / "hunyuan-vllm" / "api-key"
    return file if file.exists() and is_this_machine(url) else None


def is_this_machine(url: str) -> bool:
    """Whether the host of `url` is the machine this runs on."""
    host = urlsplit(url).hostname
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(is_loopback(address) or address in own_addresses() for address in found)
