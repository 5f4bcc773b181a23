"""A running server, as a client needs to know it before it asks thousands of questions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import httpx

from hunyuan_vllm.errors import UserError

__all__ = ["Served", "look"]


@dataclass(frozen=True)
class Served:
    """What a server said of itself.

    Attributes:
        url: without a path, as in http://127.0.0.1:8020.
        model: the name that requests call the model by.
        max_model_len: most tokens of a prompt and its answer.
        root: what the server loaded the model from.
        key: its API key.
    """

    url: str
    model: str
    max_model_len: int
    root: str
    key: str | None = field(default=None, repr=False)

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer is: the server's own folder, if this machine has it.

        Raises:
            UserError: it has not.
        """
        if Path(self.root).is_dir():
            return self.root
        raise UserError(
            f"the server's checkpoint {self.root} is not on this machine: name a folder with its tokenizer "
            "(hy.tiktoken, tokenizer_config.json, config.json) with --tokenizer"
        )


def look(url: str, key: str | None, model: str | None = None) -> Served:
    """Ask a server what it serves.

    Raises:
        UserError: it does not answer, wants another key, or serves no such model.
    """
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{base}/v1/models", headers=headers, timeout=30, trust_env=False)
    except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise UserError(f"--url {url} does not answer ({error}): start a server there (hunyuan-vllm serve)") from None
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise UserError(f"--url {url} wants {'another' if key else 'an'} API key: name its file with --api-key-file")
    try:
        cards = {card["id"]: card for card in answer.raise_for_status().json()["data"]}
        name = model or next(iter(cards))
        if name not in cards:
            raise UserError(f"--model {name}: the server has {', '.join(cards)}")
        return Served(base, name, cards[name]["max_model_len"], cards[name]["root"], key)
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError, StopIteration):
        raise UserError(f"--url {url} is no vLLM server: GET /v1/models answers {answer.status_code}") from None
