"""Keys, routes, limits, request ids, TLS and logs of a real server, on one start."""

import asyncio
import json
import os
import ssl
import subprocess
from pathlib import Path

import httpx
import openai
import pytest
from keyed_server import KEYS, LIMITS, KeyedServer, write_keys
from prometheus_client.parser import text_string_to_metric_families
from waiting import eventually

pytestmark = pytest.mark.server
ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
SALT = {"messages": [{"role": "user", "content": "Why is sea water salty?"}], "temperature": 0}
SECRET = "a-sentence-that-no-log-must-repeat"


def json_log(server: KeyedServer, request: str) -> list[dict]:
    """The lines up to that of a request, which follows its answer."""

    def found() -> list[dict]:
        lines = [json.loads(line) for line in list(server.server.output) if line.startswith("{")]
        return lines if any(line.get("request_id") == request for line in lines) else []

    return eventually(found)


# Keys


def test_every_guarded_route_is_refused_without_a_key(keyed_server):
    with keyed_server.http(None) as client, keyed_server.http("admin") as operator:
        document = operator.get("/openapi.json").json()["paths"]
        assert {"/pause", "/collective_rpc", "/invocations", CHAT, "/v1/load_lora_adapter"} <= set(document)
        refusals = set()
        for path, methods in document.items():
            for method in methods:
                answer = client.request(method, path.replace("{response_id}", "x"), json={})
                if path != "/health":
                    assert answer.status_code == 401
                    refusals.add(answer.json()["error"]["message"])
        assert refusals == {"missing or wrong API key"}
        for headers in ({}, {"Origin": "https://page.example"}, {"Access-Control-Request-Method": "GET"}):
            assert client.options("/metrics", headers=headers).status_code == 401
        preflight = {"Origin": "https://page.example", "Access-Control-Request-Method": "GET"}
        assert len(client.options("/metrics", headers=preflight).content) < 500


def test_every_refusal_of_a_key_is_the_same(keyed_server):
    """Nothing in it says how near a key was: absent, cut short, one character off, known before, another scheme."""
    revoked, near = "a-key-that-is-taken-back", f"{KEYS['alice'][:-1]}x"
    given = [None, "", "Bearer", f"Bearer {near}", f"Bearer {KEYS['alice'][:-1]}", f"Bearer {KEYS['bob']}x"]
    given += [f"Basic {KEYS['alice']}", KEYS["alice"], "Bearer alice", f"Bearer {revoked}", f"Bearer {'x' * 4000}"]
    write_keys(keyed_server.key_file, {**KEYS, "carol": revoked})
    with keyed_server.http(None) as client:
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {revoked}"}).status_code == 200
        write_keys(keyed_server.key_file, KEYS)
        for path in ("/v1/models", "/metrics", "/pause", "/nowhere"):
            answers = [client.get(path, headers={"Authorization": one} if one is not None else {}) for one in given]
            told = {
                (answer.status_code, answer.content, frozenset(set(answer.headers.items()) - varying(answer)))
                for answer in answers
            }
            assert len(told) == 1 and answers[0].status_code == 401


def varying(answer: httpx.Response) -> set[tuple[str, str]]:
    return {(name, answer.headers[name]) for name in ("date", "x-request-id")}


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz"])
def test_probes_need_no_key(keyed_server, path):
    with keyed_server.http(None) as client:
        assert client.get(path).status_code == 200


def test_keys_change_while_the_server_runs(keyed_server):
    changed = {**KEYS, "alice": "another-key-of-alice", "carol": "the-key-of-carol"}
    with keyed_server.http(None) as client:

        def status(key: str) -> int:
            return client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

        assert status(KEYS["alice"]) == 200 and status(changed["carol"]) == 401
        write_keys(keyed_server.key_file, changed)
        try:
            statuses = [status(key) for key in (KEYS["alice"], changed["alice"], changed["carol"], KEYS["bob"])]
            assert statuses == [401, 200, 200, 200]
        finally:
            write_keys(keyed_server.key_file, KEYS)
        assert status(KEYS["alice"]) == 200


# Routes


@pytest.mark.parametrize("path", ["/pause", "/invocations", "/reset_prefix_cache", "/collective_rpc", "/sleep"])
def test_administration_is_for_the_admin_key(keyed_server, path):
    with keyed_server.http("alice") as client:
        answer = client.post(path, json={})
        assert answer.status_code == 404 and f"--allow-route {path}" in answer.json()["error"]["message"]


def test_the_admin_key_administrates(keyed_server):
    with keyed_server.http("admin") as client:
        assert client.post("/reset_prefix_cache").status_code == 200
        assert client.get("/server_info").status_code == 200


def test_a_route_more(keyed_server):
    with keyed_server.http("alice") as client:
        assert client.get("/load").json() == {"server_load": 0}
        assert client.get("/version").json()["version"]
        assert client.get("/docs").status_code == 404


def test_one_model_or_adapter(keyed_server):
    client = keyed_server.openai()
    assert client.models.retrieve("hunyuan").id == "hunyuan"
    assert client.models.retrieve("style").parent == "hunyuan"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("nothing")


def test_anthropics_client_gets_answers_and_its_own_errors(keyed_server):
    import anthropic  # takes five seconds

    http = anthropic.DefaultHttpxClient(verify=keyed_server.trust, trust_env=False)
    client = anthropic.Anthropic(base_url=keyed_server.url, api_key=KEYS["bob"], http_client=http, max_retries=0)
    asked = {"model": "hunyuan", "messages": SALT["messages"], "extra_body": {"temperature": 0}}
    whole = client.messages.create(max_tokens=30, **asked)
    assert whole.content[0].text and whole.usage.output_tokens <= 30
    with client.messages.stream(max_tokens=30, **asked) as stream:
        assert stream.get_final_text() == whole.content[0].text
    counted = client.messages.count_tokens(model="hunyuan", messages=SALT["messages"])
    assert counted.input_tokens == whole.usage.input_tokens
    with pytest.raises(anthropic.UnprocessableEntityError, match="at most 256 tokens") as raised:
        client.messages.create(max_tokens=10_000, **asked)
    assert raised.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError) as raised:
        client.messages.create(**asked | {"model": "nothing", "max_tokens": 3})
    assert raised.value.body["error"]["type"] == "not_found_error"
    stranger = client.with_options(api_key="wrong")
    with pytest.raises(anthropic.AuthenticationError) as raised:
        stranger.messages.create(max_tokens=3, **asked)
    assert raised.value.body["error"]["type"] == "authentication_error"


# Tokens of a key


def tokens_of(keyed_server: KeyedServer, name: str) -> tuple[float, float]:
    with keyed_server.http() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.labels.get("key") == name]
    found = {sample.name: sample.value for sample in samples}
    return found.get("hunyuan_prompt_tokens_total", 0), found.get("hunyuan_generated_tokens_total", 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, SALT | {"n": 2, "temperature": 1}),
        ("/v1/completions", {"prompt": ["Salt is", "Water is"], "ignore_eos": True}),
        ("/v1/responses", {"input": "Why is sea water salty?", "temperature": 0}),
    ],
)
def test_tokens_are_counted_for_the_key(keyed_server, path, body, stream):
    before = tokens_of(keyed_server, "bob")
    request = f"tokens{path}-{stream}"
    body = body | {"max_output_tokens" if "responses" in path else "max_tokens": 16, "stream": stream}
    with keyed_server.http("bob") as client:
        answer = client.post(path, json=body, headers={"X-Request-Id": request})
    assert answer.status_code == 200, answer.text
    after = tokens_of(keyed_server, "bob")
    prompt, generated = (int(now - was) for now, was in zip(after, before, strict=True))
    assert prompt > 3 and generated > 3
    if not stream:
        usage = answer.json()["usage"]
        told = [usage.get("prompt_tokens", usage.get("input_tokens"))]
        told += [usage.get("completion_tokens", usage.get("output_tokens"))]
        assert [prompt, generated] == told
    line = next(line for line in json_log(keyed_server, request) if line.get("request_id") == request)
    assert (line["prompt_tokens"], line["generated_tokens"]) == (prompt, generated)


# Limits


def error_of(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == status
    return error


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"max_tokens": 257}, "max_tokens", "at most 256 tokens"),
        ({"max_completion_tokens": 257}, "max_completion_tokens", "at most 256 tokens"),
        ({"n": 9}, "n", "at most 8 sequences"),
        ({"messages": [{"role": "user", "content": "sea " * 250}]}, "messages", "takes at most 200"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_over_a_limit(keyed_server, change, param, says, stream):
    with keyed_server.http() as client:
        error = error_of(client.post(CHAT, json={**SALT, **change, "stream": stream}), 422)
    assert error["param"] == param and says in error["message"] and "\n" not in error["message"]


def test_the_other_apis_have_the_same_limits(keyed_server):
    with keyed_server.http() as client:
        long = "sea " * 250
        assert "takes at most 200" in error_of(client.post("/v1/completions", json={"prompt": long}), 422)["message"]
        assert "takes at most 200" in error_of(client.post("/v1/responses", json={"input": long}), 422)["message"]
        asked = client.post("/v1/responses", json={"input": "x", "max_output_tokens": 257})
        assert error_of(asked, 422)["param"] == "max_output_tokens"


def test_an_answer_without_max_tokens_ends_at_the_limit(keyed_server):
    answer = keyed_server.openai().completions.create(
        model="hunyuan", prompt="Sea", extra_body={"ignore_eos": True}, max_tokens=None
    )
    assert answer.usage.completion_tokens <= LIMITS["max-output-tokens"]


def test_a_body_too_large(keyed_server):
    with keyed_server.http() as client:
        content = json.dumps({"prompt": "x" * 60_000}).encode()
        for path in ("/v1/completions", "/tokenize"):
            error_of(client.post(path, content=content, headers={"Content-Type": "application/json"}), 413)


async def test_as_many_requests_as_a_key_may_have_and_no_more(keyed_server):
    body = {"prompt": "Sea", "max_tokens": 100, "ignore_eos": True, "temperature": 1}

    async def ask(client, name) -> httpx.Response:
        return await client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {KEYS[name]}"})

    async with httpx.AsyncClient(base_url=keyed_server.url, verify=keyed_server.trust, timeout=120) as client:
        with keyed_server.server.halted_engine():
            asked = [asyncio.create_task(ask(client, name)) for name in ["alice"] * 8 + ["bob"]]
            ends = asyncio.as_completed(asked)
            refused = [await next(ends) for _ in range(4)]
        answers = await asyncio.gather(*asked)
    assert [answer.status_code for answer in refused] == [429] * 4
    assert answers[-1] not in refused and [answer.status_code for answer in answers].count(200) == 5
    for answer in refused:
        assert answer.headers["retry-after"] == "1" and "try again later" in answer.json()["error"]["message"]


async def test_a_full_queue_refuses_and_then_takes_again(keyed_server):
    body = {"prompt": "Sea", "max_tokens": 100, "ignore_eos": True, "temperature": 1, "n": 7}

    async def ask(client, name) -> httpx.Response:
        return await client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {KEYS[name]}"})

    async with httpx.AsyncClient(base_url=keyed_server.url, verify=keyed_server.trust, timeout=120) as client:
        with keyed_server.server.halted_engine():  # 8 places and a queue of 6
            asked = [asyncio.create_task(ask(client, name)) for name in ("alice", "bob", "admin")]
            refused = await next(asyncio.as_completed(asked))
        answers = await asyncio.gather(*asked)
        assert refused.status_code == 429 and "waiting" in refused.text
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429]
        assert (await ask(client, "admin")).status_code == 200


def test_the_sdk_knows_the_refusal(keyed_server):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        keyed_server.openai().chat.completions.create(model="hunyuan", messages=SALT["messages"], max_tokens=257)
    assert caught.value.param == "max_tokens"


# Request ids and logs


def test_an_id_goes_in_and_comes_out(keyed_server):
    with keyed_server.http(**{"X-Request-Id": "my-id-1"}) as client:
        answer = client.post(CHAT, json={**SALT, "max_tokens": 4})
        assert answer.headers.get_list("x-request-id") == ["my-id-1"]
        assert answer.json()["id"] == "chatcmpl-my-id-1"
        assert client.get("/nowhere").headers["x-request-id"] == "my-id-1"
    with keyed_server.http(None) as client:
        answer = client.get("/v1/models")
        assert answer.status_code == 401 and len(answer.headers["x-request-id"]) == 32


async def test_one_id_for_two_requests_at_once_harms_neither(keyed_server):
    headers = {"X-Request-Id": "twice", "Authorization": f"Bearer {KEYS['alice']}"}
    async with httpx.AsyncClient(base_url=keyed_server.url, verify=keyed_server.trust, timeout=120) as client:
        asked = [client.post(CHAT, json={**SALT, "max_tokens": 20}, headers=headers) for _ in range(2)]
        answers = await asyncio.gather(*asked)
    texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
    assert len(texts) == 1 and texts.pop().strip()


def test_the_log_is_json_with_a_line_for_each_request(keyed_server):
    with keyed_server.http("bob", **{"X-Request-Id": "logged-1"}) as client:
        client.post(CHAT, json={**SALT, "max_tokens": 4})
    (line,) = [line for line in json_log(keyed_server, "logged-1") if line.get("request_id") == "logged-1"]
    assert (line["key"], line["method"], line["path"], line["status"]) == ("bob", "POST", CHAT, 200)
    assert 0 < line["first_byte_seconds"] <= line["seconds"]
    assert line["levelname"] == "INFO" and line["asctime"]


def test_no_log_has_what_was_said_or_a_key(keyed_server):
    asked = [
        {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4},
        {"messages": [{"role": SECRET, "content": SECRET}]},
        {"messages": [{"role": "user", "content": f"{SECRET}{' sea' * 250}"}]},
        {"messages": [{"role": "user", "content": SECRET}], "temperature": SECRET},
        {"messages": [{"role": "user", "content": SECRET}], "structured_outputs": {"regex": f"({SECRET}"}},
    ]
    with keyed_server.http() as client:
        statuses = [client.post(f"{CHAT}?q={SECRET}", json=body).status_code for body in asked]
        client.post(CHAT, content=f"{{{SECRET}".encode(), headers={"Content-Type": "application/json"})
        client.get("/v1/models", headers={"X-Request-Id": "the-last"})
    assert statuses == [200, 400, 422, 400, 400]
    assert len(json_log(keyed_server, "the-last")) > 10
    output = keyed_server.server.said
    assert SECRET not in output
    assert not any(key in output for key in KEYS.values())


# TLS


def test_nothing_is_said_without_tls(keyed_server):
    with pytest.raises(httpx.TransportError):
        httpx.get(keyed_server.url.replace("https", "http") + "/health", trust_env=False)
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{keyed_server.url}/health", verify=ssl.create_default_context(), trust_env=False)


def test_openapi_script_speaks_tls_with_a_key_of_the_file(keyed_server):
    variables = {
        "PORT": str(keyed_server.server.port),
        "TLS_CA_FILE": str(keyed_server.certificate),
        "HUNYUAN_VLLM_API_KEY_FILE": str(keyed_server.key_file),
    }
    asked = subprocess.run(
        ["sh", ROOT / "deploy" / "openapi.sh", "--raw"], capture_output=True, text=True, timeout=120,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["choices"][0]["finish_reason"] == "stop"
