"""The routes that exist: an allow-list of vLLM's, and ASGI middleware that knows no others.

A vLLM server has routes that pause it, change its weights or call any method in its workers, and the next version may
bring more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from hunyuan_vllm.server.middleware.asgi import App, Receive, Scope, Send, notes, refuse
from hunyuan_vllm.server.middleware.counters import count_refusal

# What may be read without a key: says only whether the server is alive, and load balancers carry none.
KEYLESS = ("/health", "/livez", "/readyz")
DOCUMENT = "/openapi.json"
MODELS = "/v1/models/"
VARIABLE = re.compile(r"\\\{\w+(:path)?\\\}")
LONGEST = 200  # characters of a path that is named
SERVED = (
    *KEYLESS,
    "/v1/models",
    "/v1/models/{model:path}",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/cancel",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/metrics",
    "/version",
    DOCUMENT,
)


class Paths:
    """A set of paths, of which some have a variable part: `/v1/responses/{response_id}`, or of any depth `{x:path}`."""

    def __init__(self, templates: Iterable[str]) -> None:
        parts = (VARIABLE.sub(lambda found: ".+" if found[1] else "[^/]+", re.escape(each)) for each in templates)
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
        path = scope["path"]
        if not (path in self._served or (self._admin and notes(scope).get("admin"))):
            count_refusal("route")
            named = f"{path[:LONGEST]} is not served here"
            remedy = f"if vLLM has it, hunyuan-vllm serve --allow-route {path[:LONGEST]} serves it"
            await refuse(scope, send, HTTPStatus.NOT_FOUND, f"{named}; {remedy}")
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


class OneModel:
    """Answers GET /v1/models/NAME, which OpenAI's clients know and vLLM has not, from vLLM's list of models."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or not scope["path"].startswith(MODELS):
            await self._app(scope, receive, send)
            return
        name = scope["path"].removeprefix(MODELS)
        listed = await scope["app"].state.openai_serving_models.show_available_models()
        for model in listed.data:
            if model.id == name:
                await JSONResponse(model.model_dump())(scope, receive, send)
                return
        await refuse(scope, send, HTTPStatus.NOT_FOUND, f"The model `{name[:LONGEST]}` does not exist.", "model")


def _others(paths: Iterable[str], served: Paths) -> Iterator[str]:
    for path in paths:
        if re.sub(r"\{\w+\}", "x", path) not in served:
            yield path
