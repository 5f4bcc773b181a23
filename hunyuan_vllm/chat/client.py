"""A server as a chat needs it: which models it has, and an answer of one as it is generated."""

from __future__ import annotations

import json
import ssl
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx

from hunyuan_vllm.errors import UserError

__all__ = ["Client", "Model", "Part", "Usage"]

# An answer may wait long behind others, and for the first token of a long prompt.
TIMEOUT = httpx.Timeout(600, connect=10)


@dataclass(frozen=True)
class Model:
    """A model a server offers.

    Attributes:
        name: what requests call it by.
        context: most tokens of a conversation, if it says.
        root: what it was loaded from, if it says.
    """

    name: str
    context: int | None
    root: str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: of all that was said before, and of the answer so far."""

    prompt: int
    completion: int


@dataclass(frozen=True)
class Part:
    """A piece of an answer: what was there of text, usage and the reason of its end ("stop", "length")."""

    text: str
    usage: Usage | None
    finish: str | None


class Client:
    """Asks one server. Whatever goes wrong is a UserError: one line with what to do."""

    def __init__(self, url: str, key: str | None, authority: Path | None = None) -> None:
        """Args:
        url: without a path, as in http://127.0.0.1:8020.
        key: its API key, if it asks for one.
        authority: certificates to trust instead of the system's, where it speaks HTTPS.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=TIMEOUT, verify=_trusted(authority), trust_env=False
        )

    def models(self) -> list[Model]:
        """What the server offers, the usual one first."""
        try:
            found = json.loads(self.read("/v1/models"))["data"]
            return [Model(str(model["id"]), model.get("max_model_len"), model.get("root")) for model in found]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"what answers at {self.url} is no OpenAI-compatible server") from None

    def read(self, path: str) -> str:
        """The text of a page of the server, such as /metrics."""
        try:
            response = self._http.get(path)
        except httpx.TransportError as error:
            raise self._unreachable(error) from None
        if response.is_error:
            raise self._problem(response.status_code, response.text, response.headers)
        return response.text

    def stream(self, request: Mapping[str, Any]) -> Generator[Part, None, None]:
        """Parts of the answer to a chat request (model, messages, sampling); closing it ends the work on the server."""
        body = {**request, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    raise self._problem(response.status_code, response.read().decode(), response.headers)
                yield from self._parts(response.iter_lines())
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._unreachable(error) from None
        except httpx.TransportError:
            raise UserError("the connection ended in the middle of the answer") from None

    def _parts(self, lines: Iterator[str]) -> Iterator[Part]:
        whole = False
        for line in lines:
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:"):
                continue
            if data == "[DONE]":
                return
            chunk = json.loads(data)
            if error := chunk.get("error"):
                raise self._problem(error.get("code", 500), data, {})
            choice = (chunk.get("choices") or [{}])[0]
            text = choice.get("delta", {}).get("content") or ""
            whole = whole or bool(choice.get("finish_reason"))
            yield Part(text, _usage(chunk.get("usage")), choice.get("finish_reason"))
        if not whole:
            raise UserError("the connection ended in the middle of the answer")

    def _unreachable(self, error: httpx.TransportError) -> UserError:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return UserError(
                f"the certificate of {self.url} is not trusted: name a file with its authority's with --ca"
            )
        return UserError(
            f"no server answers at {self.url} ({error}): start one with `hunyuan-vllm serve`, or name where it is "
            "with --url"
        )

    def _problem(self, status: int, body: str, headers: Mapping[str, str]) -> UserError:
        message = _message(body) or HTTPStatus(status).phrase
        if status == HTTPStatus.UNAUTHORIZED:
            return UserError(
                f"{self.url} asks for an API key ({message}): set VLLM_API_KEY, or name a file that holds it with "
                "--key-file"
            )
        if seconds := headers.get("retry-after"):
            return UserError(f"the server is busy ({message}): try again in {seconds} s")
        if "context length" in message:
            return UserError(f"{message} (/clear starts anew)")
        return UserError(f"the server answered {status}: {message}")


def _trusted(authority: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authority)
    except OSError as error:  # ssl's own errors among them
        raise UserError(f"--ca {authority} holds no certificates: {error.strerror or error}") from None


def _usage(counts: Mapping[str, int] | None) -> Usage | None:
    return Usage(counts["prompt_tokens"], counts["completion_tokens"]) if counts else None


def _message(body: str) -> str | None:
    try:
        content = json.loads(body)
        return str(content["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None
