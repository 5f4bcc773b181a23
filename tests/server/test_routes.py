"""The allow-list around vLLM's real application: what is served, what is not, and what the OpenAPI document says."""

from argparse import Namespace
from functools import cache

import httpx
import pytest
from fastapi.routing import APIRoute
from vllm import envs
from vllm.entrypoints.launchers.app import build_app
from vllm.utils.argparse_utils import FlexibleArgumentParser

from hunyuan_vllm.server.asgi import inner_path, notes
from hunyuan_vllm.server.routes import SERVED, AllowedRoutes, Paths

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:  # vLLM 0.33
    from vllm.entrypoints.common.cli_args import make_arg_parser

ADMINISTRATIVE = {
    "/pause", "/resume", "/sleep", "/wake_up", "/update_weights", "/reset_prefix_cache", "/collective_rpc",
    "/server_info", "/invocations", "/scale_elastic_ep", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load",
}  # fmt: skip


@cache
def application():
    """vLLM's, with all the routes that a server in development mode has."""
    variables = {"VLLM_SERVER_DEV_MODE": True, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": True}
    patch = pytest.MonkeyPatch()
    for name, value in variables.items():
        patch.setenv(name, str(int(value)))
    if hasattr(envs, "disable_envs_cache"):
        envs.disable_envs_cache()
    arguments: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    try:
        return build_app(arguments, ("generate",))
    finally:
        patch.undo()


def paths_of(app) -> set[str]:
    return {route.path for route in app.routes if isinstance(route, APIRoute)}


async def ask(middleware, method: str, path: str, **keywords) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(middleware), base_url="http://server") as client:
        return await client.request(method, path, **keywords)


async def inside(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"inside"})


def test_vllm_has_routes_that_are_not_for_clients():
    assert ADMINISTRATIVE <= paths_of(application())


async def test_every_other_route_of_vllm_is_not_there():
    served = Paths(SERVED)
    others = {path for path in paths_of(application()) if path.replace("{response_id}", "x") not in served}
    assert others >= ADMINISTRATIVE
    for path in sorted(others):
        for method in ("GET", "POST", "DELETE"):
            answer = await ask(AllowedRoutes(inside), method, path)
            assert (answer.status_code, answer.json()["error"]["message"]) == (404, "Not Found"), path


async def test_what_is_served_is_there():
    for template in SERVED:
        if template != "/openapi.json":
            path = template.replace("{response_id}", "resp_1")
            assert (await ask(AllowedRoutes(inside), "GET", path)).text == "inside", path


@pytest.mark.parametrize(
    "path", ["/v1/models/", "//v1/models", "/v1/Models", "/metrics/x", "/metricsx", "/v1/responses/a/b", "/v1/", "/"]
)
async def test_only_the_very_path_is(path):
    assert (await ask(AllowedRoutes(inside), "GET", path)).status_code == 404


@pytest.mark.parametrize("path", ["/v1/models/../../pause", "/v1%2F..%2Fpause", "/v1/responses/..%2f..%2fpause"])
async def test_no_detour_leads_elsewhere(path):
    """Whatever passes is what the application would route by, too."""
    seen = []

    async def noting(scope, receive, send):
        seen.append(scope["path"])
        await inside(scope, receive, send)

    await ask(AllowedRoutes(noting), "POST", path)
    assert "/pause" not in seen


async def test_a_route_more():
    middleware = AllowedRoutes(inside, extra=["/v1/messages", "/x/{name}"])
    for path in ("/v1/messages", "/x/y", "/v1/models"):
        assert (await ask(middleware, "POST", path)).text == "inside"
    assert (await ask(middleware, "POST", "/pause")).status_code == 404


@pytest.mark.parametrize("may", [True, False])
async def test_administration(may):
    async def keyed(scope, receive, send):
        notes(scope)["admin"] = may
        await AllowedRoutes(inside, admin=True)(scope, receive, send)

    assert (await ask(keyed, "POST", "/pause")).status_code == (200 if may else 404)
    assert (await ask(keyed, "GET", "/v1/models")).status_code == 200


async def test_a_prefix_of_a_proxy_is_left_out():
    async def behind_proxy(scope, receive, send):
        await AllowedRoutes(inside)({**scope, "root_path": "/hunyuan"}, receive, send)

    assert (await ask(behind_proxy, "GET", "/hunyuan/v1/models")).text == "inside"
    assert (await ask(behind_proxy, "GET", "/v1/models")).text == "inside"  # the proxy took it off
    assert (await ask(behind_proxy, "POST", "/hunyuan/pause")).status_code == 404
    assert inner_path({"path": "/hunyuanx/pause", "root_path": "/hunyuan"}) == "/hunyuanx/pause"


async def test_the_document_names_what_is_served():
    app = application()

    async def with_app(scope, receive, send):
        await AllowedRoutes(app)({**scope, "app": app}, receive, send)

    named = set((await ask(with_app, "GET", "/openapi.json")).json()["paths"])
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/version"} <= named
    assert named <= set(SERVED)
