"""Options of `hunyuan-vllm serve` about what clients may do: routes and limits."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

__all__ = [
    "AdminRoutes",
    "AllowedRoutes",
    "IgnoreUnknownFields",
    "MaxBody",
    "MaxOutputTokens",
    "MaxPromptTokens",
    "MaxQueue",
    "MaxRequestsPerKey",
    "MaxSequences",
    "surface_of",
]

MIB = 2**20
ROUTES, LIMITS = "What is served", "Limits (0 is none)"


def _limit(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, min=0, metavar=metavar, help=text, rich_help_panel=LIMITS, show_default=False)


AdminRoutes = Annotated[
    bool,
    typer.Option(
        "--admin-routes", help="Serve vLLM's administrative routes, too, to the admin key.", rich_help_panel=ROUTES
    ),
]
AllowedRoutes = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-route", metavar="PATH", help="Serve this route of vLLM's as well; repeatable.", rich_help_panel=ROUTES
    ),
]
IgnoreUnknownFields = Annotated[
    bool,
    typer.Option(
        "--ignore-unknown-fields",
        help="Pass over fields of a request that nothing reads, as vLLM does, instead of refusing them.",
        rich_help_panel=ROUTES,
    ),
]
MaxBody = Annotated[float | None, _limit("--max-body", "MIB", "Size of a request (default: 16).")]
MaxPromptTokens = Annotated[
    int | None, _limit("--max-prompt-tokens", "N", "Tokens of a prompt (default: the context length).")
]
MaxOutputTokens = Annotated[
    int | None, _limit("--max-output-tokens", "N", "Tokens of an answer (default: the context length).")
]
MaxSequences = Annotated[
    int | None, _limit("--max-sequences", "N", "Answers to one request: its prompts times n (default: 256).")
]
MaxRequestsPerKey = Annotated[
    int | None, _limit("--max-requests-per-key", "N", "Requests of a key under way at once (default: 512).")
]
MaxQueue = Annotated[int | None, _limit("--max-queue", "N", "Sequences waiting for the engine (default: 1024).")]


def surface_of(
    admin: bool,
    routes: list[str] | None,
    max_body: float | None,
    ignore_unknown_fields: bool = False,
    **limits: int | None,
) -> Any:
    """The Surface these options ask for; what they leave open is as HUNYUAN_VLLM_SURFACE or the default has it.

    Raises:
        UserError: a route is no path, or the variable is no surface.
    """
    from pydantic import ValidationError

    from hunyuan_vllm.errors import UserError
    from hunyuan_vllm.server.surface import SURFACE_VARIABLE, Surface

    for route in routes or ():
        if not route.startswith("/"):
            raise UserError(f"--allow-route {route} is no path: give one as in --allow-route /load")
    given: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    if admin:
        given["admin"] = True
    if ignore_unknown_fields:
        given["ignore_unknown_fields"] = True
    if routes:
        given["extra_routes"] = tuple(routes)
    if max_body is not None:
        given["max_body"] = round(max_body * MIB)
    try:
        return Surface.read(os.environ).model_copy(update=given)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"{SURFACE_VARIABLE}: {where}{': ' if where else ''}{problem['msg']}") from None
