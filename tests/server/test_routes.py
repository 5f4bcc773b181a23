"""The allow-list around vLLM's real application: what is served, what is not, and what the OpenAPI document says."""

from argparse import Namespace
from functools import cache
from unittest.mock import AsyncMock

import httpx
import pytest
from fastapi.routing import APIRoute
from openai import AsyncOpenAI, NotFoundError
from vllm import envs
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList
from vllm.utils.argparse_utils import FlexibleArgumentParser

from hunyuan_vllm.server.middleware.asgi import request_info
from hunyuan_vllm.server.middleware.routes import SERVED, AllowedRoutes, pattern_of

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:  # vLLM 0.33
    from vllm.entrypoints.common.cli_args import make_arg_parser

KEY = "the-key-of-these-tests"
BEHIND_KEY = "hunyuan_vllm.server.middleware.stack.BehindKey"
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
    served = pattern_of(SERVED)
    others = {path for path in paths_of(application()) if not served.fullmatch(path.replace("{response_id}", "x"))}
    assert others >= ADMINISTRATIVE
    for path in sorted(others):
        for method in ("GET", "POST", "DELETE"):
            answer = await ask(AllowedRoutes(inside), method, path)
            assert answer.status_code == 404
            assert f"--allow-route {path[:200]}" in answer.json()["error"]["message"]


async def test_what_is_served_is_there():
    for template in SERVED:
        if template not in ("/openapi.json", "/v1/models/{model:path}"):
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
    middleware = AllowedRoutes(inside, extra=["/load", "/x/{name}"])
    for path in ("/load", "/x/y", "/v1/models"):
        assert (await ask(middleware, "POST", path)).text == "inside"
    assert (await ask(middleware, "POST", "/pause")).status_code == 404


@pytest.mark.parametrize("may", [True, False])
async def test_administration(may):
    async def keyed(scope, receive, send):
        request_info(scope)["admin"] = may
        await AllowedRoutes(inside, admin=True)(scope, receive, send)

    assert (await ask(keyed, "POST", "/pause")).status_code == (200 if may else 404)
    assert (await ask(keyed, "GET", "/v1/models")).status_code == 200


@pytest.fixture
def behind_key(monkeypatch):
    """vLLM's application with all of our layers, as a server has them; `root` is vLLM's --root-path."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")

    def build(*flags: str):
        arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([*flags, "--middleware", BEHIND_KEY])
        app = build_app(arguments, ("generate",))
        models = ModelList(data=[ModelCard(id=name) for name in ("hunyuan", "/models/large", "style")])
        app.state.openai_serving_models = Namespace(show_available_models=AsyncMock(return_value=models))
        app.state.engine_client = Namespace(errored=False)
        return app

    return build


@pytest.mark.parametrize("root", ["/hunyuan", "/hunyuan/", "/v1", "/a/b"])
@pytest.mark.parametrize("stripped", [True, False])
async def test_behind_a_proxy_with_a_prefix(behind_key, root, stripped, caplog_vllm):
    """Whether the proxy takes its prefix off or not: routes, probes, refusals, the form of errors and the log."""
    app = behind_key(f"--root-path={root}")
    prefix = "" if stripped else root.rstrip("/")
    if root == "/v1" and stripped:
        pytest.skip("the same path may then have the prefix or not: Starlette takes it for the prefix")
    keyed = {"headers": {"Authorization": f"Bearer {KEY}"}}
    assert (await ask(app, "GET", f"{prefix}/livez")).json() == {"status": "alive"}
    assert (await ask(app, "GET", f"{prefix}/v1/models")).status_code == 401
    assert (await ask(app, "GET", f"{prefix}/v1/models", **keyed)).json()["object"] == "list"
    assert (await ask(app, "GET", f"{prefix}/version", **keyed)).status_code == 200
    assert (await ask(app, "GET", f"{prefix}/metrics", **keyed)).status_code == 200
    assert (await ask(app, "POST", f"{prefix}/pause", **keyed)).status_code == 404
    assert (await ask(app, "POST", "/hunyuanx/pause", **keyed)).status_code == 404
    wrong = await ask(app, "POST", f"{prefix}/v1/chat/completions", json={"messages": "x"}, **keyed)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "messages")
    assert "path=/v1/chat/completions status=400" in caplog_vllm.text
    assert "path=/livez" not in caplog_vllm.text


OPEN_PATHS = ("/health", "/livez", "/readyz", "/", "/chat/chat.js")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "X")


async def test_without_a_key_no_method_opens_more_than_is_meant_to_be_open(behind_key):
    app = behind_key()
    paths = {path.replace("{response_id}", "x") for path in paths_of(app)} | {"/metrics", "/metrics/", "/openapi.json"}
    for path in sorted(paths - set(OPEN_PATHS)):
        for method in METHODS:
            for headers in ({}, {"Origin": "https://x.example"}, {"Access-Control-Request-Method": "GET"}):
                assert (await ask(app, method, path, headers=headers)).status_code == 401, (method, path, headers)
    for path in ("/health", "/livez"):
        for method in METHODS[2:]:
            assert (await ask(app, method, path)).status_code in (401, 405), (method, path)


@pytest.mark.parametrize("path", ["/metrics", "/v1/models", "/v1/chat/completions", "/pause", "/nothing"])
async def test_a_preflight_tells_nothing_but_whether_the_page_may_ask(behind_key, path):
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "GET"}
    closed = await ask(behind_key(), "OPTIONS", path, headers=asked)
    assert closed.status_code in (400, 404)
    assert "access-control-allow-origin" not in closed.headers and len(closed.content) < 500
    page = '--allowed-origins=["https://page.example"]'
    admitted = await ask(behind_key(page), "OPTIONS", path, headers=asked)
    assert len(admitted.content) < 500
    assert admitted.headers.get("access-control-allow-origin") in (None, "https://page.example")


async def test_a_page_that_is_allowed_may_ask(behind_key):
    app = behind_key('--allowed-origins=["https://page.example"]')
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    preflight = await ask(app, "OPTIONS", "/v1/chat/completions", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://page.example"
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    for origin, allowed in (("https://page.example", "https://page.example"), ("https://other.example", None)):
        headers = {"Origin": origin, "Authorization": f"Bearer {KEY}"}
        answer = await ask(app, "GET", "/v1/models", headers=headers)
        assert answer.headers.get("access-control-allow-origin") == allowed
    assert (await ask(app, "GET", "/v1/models", headers={"Origin": "https://page.example"})).status_code == 401


async def test_one_model(behind_key):
    transport = httpx.ASGITransport(behind_key())
    async with httpx.AsyncClient(transport=transport) as http:
        client = AsyncOpenAI(base_url="http://server/v1", api_key=KEY, http_client=http, max_retries=0)
        for name in ("hunyuan", "style", "/models/large"):
            assert (await client.models.retrieve(name)).id == name
        with pytest.raises(NotFoundError, match="`nothing` does not exist") as raised:
            await client.models.retrieve("nothing")
        assert raised.value.body["param"] == "model"
        assert (await http.get("http://server/v1/models/hunyuan")).status_code == 401


@pytest.mark.parametrize(
    ("body", "status", "kind", "says"),
    [
        (b"{", 400, "invalid_request_error", "not JSON"),
        (b'{"model": "x", "messages": [], "max_tokens": "many"}', 400, "invalid_request_error", "max_tokens"),
        (b'{"model": "x", "messages": [], "max_tokens": 0}', 400, "invalid_request_error", "max_tokens"),
        (b'{"messages": [], "max_tokens": 1}', 400, "invalid_request_error", "model is required"),
    ],
)
async def test_errors_of_anthropics_api_have_its_form(behind_key, body, status, kind, says):
    headers = {"x-api-key": KEY, "Content-Type": "application/json"}
    answer = await ask(behind_key(), "POST", "/v1/messages", content=body, headers=headers)
    content = answer.json()
    assert (answer.status_code, content["type"], content["error"]["type"]) == (status, "error", kind)
    assert says in content["error"]["message"]


async def test_refusals_of_anthropics_api_have_its_form(behind_key, monkeypatch):
    monkeypatch.setenv("HUNYUAN_VLLM_API_POLICY", '{"max_body": 10, "max_output_tokens": 5}')
    app = behind_key()
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        answer = (await ask(app, "POST", path, json={})).json()
        assert (answer["type"], answer["error"]["type"]) == ("error", "authentication_error")
        answer = (await ask(app, "POST", path, json={"max_tokens": 10**9}, headers={"x-api-key": KEY})).json()
        assert (answer["type"], answer["error"]["type"]) == ("error", "request_too_large")


async def test_the_document_names_what_is_served():
    app = application()

    async def with_app(scope, receive, send):
        await AllowedRoutes(app)({**scope, "app": app}, receive, send)

    named = set((await ask(with_app, "GET", "/openapi.json")).json()["paths"])
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/version"} <= named
    assert named <= set(SERVED)
