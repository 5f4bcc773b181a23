"""The routes that are served: an allow-list of vLLM's

vLLM has routes that pause the server, change its weights or call any method in its workers, and the next version may
have more.
"""

import re
from collections.abc import Iterable
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from hunyuan_vllm.server.middleware.asgi import App, Receive, Scope, Send, refuse, request_info
from hunyuan_vllm.server.middleware.metrics import count_refusal

# Readable without a key: they say only whether the server is alive, and load balancers have no key.
KEYLESS = ("/health", "/livez", "/readyz")
DOCUMENT = "/openapi.json"
MODELS = "/v1/models/"
VARIABLE = re.compile(r"\\\{\w+(:path)?\\\}")
MAX_PATH = 200  # characters of a path in a message
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


def pattern_of(templates: Iterable[str]) -> re.Pattern[str]:
    """For paths, some with a variable part: `/v1/responses/{response_id}`, or of any depth `{x:path}`."""
    parts = (VARIABLE.sub(lambda found: ".+" if found[1] else "[^/]+", re.escape(each)) for each in templates)
    return re.compile("|".join(parts))


class AllowedRoutes:
    """Answers 404 to a path that is not served, even if vLLM has it, and removes it from the OpenAPI document.

    Answers GET /v1/models/NAME, which vLLM does not have, from vLLM's list of models.
    """

    def __init__(self, app: App, extra: Iterable[str] = (), admin: bool = False) -> None:
        """Args:
        extra: paths that are served beside SERVED.
        admin: all of vLLM's routes are, with a key that may administrate.
        """
        self._app = app
        self._served = pattern_of((*SERVED, *extra))
        self._admin = admin
        self._trimmed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if not (self._served.fullmatch(path) or (self._admin and request_info(scope).get("admin"))):
            count_refusal("route")
            shown = path[:MAX_PATH]
            message = f"{shown} is not served here; if vLLM has it, start hunyuan-vllm serve with --allow-route {shown}"
            await refuse(scope, send, HTTPStatus.NOT_FOUND, message)
        elif path.startswith(MODELS) and scope.get("method") == "GET":
            await self._answer_model(scope, receive, send)
        else:
            if path == DOCUMENT and not self._admin and not self._trimmed:
                self._trim_document(scope["app"])
            await self._app(scope, receive, send)

    async def _answer_model(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path"].removeprefix(MODELS)
        listed = await scope["app"].state.openai_serving_models.show_available_models()
        for model in listed.data:
            if model.id == name:
                await JSONResponse(model.model_dump())(scope, receive, send)
                return
        await refuse(scope, send, HTTPStatus.NOT_FOUND, f"The model `{name[:MAX_PATH]}` does not exist.", "model")

    def _trim_document(self, application: FastAPI) -> None:
        """Remove what is not served from the document, which FastAPI makes once and keeps."""
        paths = application.openapi()["paths"]
        for path in [each for each in paths if not self._served.fullmatch(re.sub(r"\{\w+\}", "x", each))]:
            del paths[path]
        self._trimmed = True
