"""A client's view of a running server: address, API key, model"""

import json
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from hunyuan_vllm.envs import Settings
from hunyuan_vllm.server.keys import parse_keys, read_key_file
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.net import host_port, is_loopback, local_address, own_addresses

TIMEOUT = 30  # seconds


@dataclass(frozen=True)
class ServedModel:
    """The first model of a running server.

    Attributes:
        url: the server's, without a path, as in http://127.0.0.1:8020.
        context: maximum tokens of a prompt and its answer, if known.
        root: the server's checkpoint.
    """

    url: str
    name: str
    context: int | None
    root: str
    key: str | None = field(default=None, repr=False)

    def tokenizer(self, given: Path | None = None) -> Path:
        """Directory of the tokenizer: what --tokenizer names, or the server's checkpoint, if this machine has it."""
        directory = given or Path(self.root)
        if (directory / "tokenizer_config.json").is_file():
            return directory
        raise UserError(
            f"{directory} is not a directory with a tokenizer on this machine: name one (hy.tiktoken, "
            "tokenizer_config.json, config.json) with --tokenizer"
        )

    def read(self, path: str) -> str:
        """The text of a page of the server, such as /metrics."""
        return _get(self.url + path, self.key)


def connect(url: str, key: str | None) -> ServedModel:
    """Ask a server for its first model."""
    _host(url)
    base = url.rstrip("/").removesuffix("/v1")
    try:
        card = json.loads(_get(f"{base}/v1/models", key))["data"][0]
        return ServedModel(base, card["id"], card.get("max_model_len"), str(card.get("root") or ""), key)
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"the server at {base} is not OpenAI-compatible: GET /v1/models lists no model") from None


def _host(url: str) -> str:
    """The host of an http or https URL."""
    with suppress(ValueError):  # raised for an unmatched bracket and for a port that is not a number
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.hostname
    raise UserError(f"--url {url} is not the address of a server: use the form http://127.0.0.1:8020")


def _get(url: str, key: str | None) -> str:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:  # OpenSSL's certificates, or those of SSL_CERT_FILE
        response = httpx.get(
            url, headers=headers, timeout=TIMEOUT, verify=ssl.create_default_context(), trust_env=False
        )
    except httpx.TransportError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise UserError(f"the certificate of {url} is not trusted: set SSL_CERT_FILE to its authority's") from None
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
    file = file or settings.api_key_file
    if file is None:
        made_by_serve = settings.config_home / "hunyuan-vllm" / "api-key"  # sent only to a server on this machine
        file = made_by_serve if made_by_serve.exists() and is_this_machine(url) else None
    return next(iter(read_key_file(file).values())) if file else None


def is_this_machine(url: str) -> bool:
    """Whether the host of `url` is the machine this runs on."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(_host(url), None)}
    except OSError:
        return False
    return all(is_loopback(address) or address in own_addresses() for address in found)
