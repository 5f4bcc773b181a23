"""The routes that exist: an allow-list of vLLM's, and ASGI middleware that knows no others.

A vLLM server has routes that pause it, change its weights or call any method in its workers, and the next version may
bring more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from http import HTTPStatus

from fastapi import FastAPI

from hunyuan_vllm.server.asgi import App, Receive, Scope, Send, inner_path, notes, refuse
from hunyuan_vllm.server.refusals import count_refusal

__all__ = ["KEYLESS", "SERVED", "AllowedRoutes", "Paths"]

# What may be read without a key: says only whether the server is alive, and load balancers carry none.
KEYLESS = ("/health", "/livez", "/readyz")
DOCUMENT = "/openapi.json"
SERVED = (
    *KEYLESS,
    "/v1/models",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/cancel",
    "/tokenize",
    "/detokenize",
    "/metrics",
    "/version",
    DOCUMENT,
)


class Paths:
    """A set of paths, of which some have a variable part, as in `/v1/responses/{response_id}`."""

    def __init__(self, templates: Iterable[str]) -> None:
        parts = (re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template)) for template in templates)
        self._pattern = re.compile("|".join(parts) or r"(?!)")

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and self._pattern.fullmatch(path) is not None


class AllowedRoutes:
    """Answers 404 to a path that is not served, whatever vLLM has there; and leaves it out of the OpenAPI document."""

    def __init__(self, app: App, extra: Iterable[str] = (), admin: bool = False) -> None:
        """Args:
        extra: paths that are served beside SERVED.
        admin: all of vLLM's routes are, for a key that may administrate.
        """
        self._app = app
        self._served = Paths((*SERVED, *extra))
        self._admin = admin
        self._trimmed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = inner_path(scope)
        if not (path in self._served or (self._admin and notes(scope).get("admin"))):
            count_refusal("route")
            await refuse(scope, send, HTTPStatus.NOT_FOUND, "Not Found")
            return
        if path == DOCUMENT and not self._admin and not self._trimmed:
            self._trim(scope["app"])
        await self._app(scope, receive, send)

    def _trim(self, application: FastAPI) -> None:
        """Take what is not served out of the document, which FastAPI makes once and keeps."""
        paths = application.openapi()["paths"]
        for path in list(_others(paths, self._served)):
            del paths[path]
        self._trimmed = True


def _others(paths: Iterable[str], served: Paths) -> Iterator[str]:
    for path in paths:
        if re.sub(r"\{\w+\}", "x", path) not in served:
            yield path
