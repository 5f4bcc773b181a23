"""API keys: asked for on every path but probes, several by name, kept private, rotated while serving."""

import os
import stat
import time
from statistics import median

import httpx
import pytest

from hunyuan_vllm.server.keys import KeyRing, create_key_file, parse_keys, read_key_file
from hunyuan_vllm.server.middleware.asgi import request_info
from hunyuan_vllm.server.middleware.auth import RequireApiKey
from hunyuan_vllm.util.errors import UserError

KEY = "a-key-of-32-characters-or-so"
WRONG = [f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer ", "Bearer", f"Bearer é{KEY}"]
ALICE, BOB = "key-of-alice", "key-of-bob"


async def application(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"inside {request_info(scope).get('key')}".encode()})


def client_with(environ: dict[str, str]) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=RequireApiKey(application, KeyRing(environ)))
    return httpx.AsyncClient(transport=transport, base_url="http://server")


@pytest.fixture
def client():
    return client_with({"VLLM_API_KEY": KEY})


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def write(file, text: str) -> None:
    beside = file.with_suffix(".new")
    beside.touch(mode=0o600)
    beside.write_text(text)
    beside.rename(file)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/tokenize", "/invocations", "/pause", "/metrics"])
async def test_every_path_wants_the_key(client, path):
    assert (await client.post(path)).status_code == 401
    assert (await client.get(path)).status_code == 401
    assert (await client.post(path, headers=bearer(KEY))).status_code == 200
    assert (await client.post(path, headers={"Authorization": f"bearer {KEY}"})).status_code == 200


@pytest.mark.parametrize("value", WRONG)
async def test_nothing_but_the_key_opens(client, value):
    response = await client.get("/v1/models", headers={"Authorization": value.encode()})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == 401
    assert "inside" not in response.text and KEY not in response.text


async def test_two_keys_are_none(client):
    headers = [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")]
    assert (await client.get("/v1/models", headers=headers)).status_code == 401


async def test_probes_and_preflights_need_no_key(client):
    assert (await client.get("/health")).status_code == 200
    assert (await client.head("/health")).status_code == 200
    assert (await client.post("/health")).status_code == 401
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert (await client.options("/v1/chat/completions", headers=asked)).status_code == 200
    assert (await client.get("/health/../v1/models")).status_code == 401
    assert (await client.get("/healthx")).status_code == 401


@pytest.mark.parametrize("left_out", ["Origin", "Access-Control-Request-Method"])
async def test_an_options_request_that_is_no_preflight_needs_the_key(client, left_out):
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "GET"}
    del asked[left_out]
    assert (await client.options("/metrics", headers=asked)).status_code == 401
    assert (await client.options("/metrics", headers=asked | bearer(KEY))).status_code == 200


async def test_anthropics_header_carries_a_key(client):
    assert (await client.post("/v1/messages", headers={"x-api-key": KEY})).text == "inside default"
    for wrong in ({"x-api-key": f"{KEY}x"}, {"x-api-key": f"Bearer {KEY}"}, {"x-api-key": KEY, **bearer("wrong")}):
        assert (await client.post("/v1/messages", headers=wrong)).status_code == 401
    twice = [("x-api-key", KEY), ("x-api-key", KEY)]
    assert (await client.post("/v1/messages", headers=twice)).status_code == 401


async def test_a_websocket_is_closed():
    sent = []

    async def send(message):
        sent.append(message)

    guarded = RequireApiKey(application, KeyRing({"VLLM_API_KEY": KEY}))
    await guarded({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_without_any_key_the_server_does_not_start():
    with pytest.raises(UserError, match="is required but not set"):
        KeyRing({})


async def test_several_keys_have_names(tmp_path):
    file = tmp_path / "keys"
    write(file, f"# who may\nalice {ALICE}\n\nbob\t{BOB}  \n")
    client = client_with({"HUNYUAN_VLLM_API_KEY_FILE": str(file)})
    for name, key in (("alice", ALICE), ("bob", BOB)):
        assert (await client.get("/v1/models", headers=bearer(key))).text == f"inside {name}"
    for wrong in ("alice", f"alice {ALICE}", f"{ALICE}{BOB}", "#"):
        assert (await client.get("/v1/models", headers=bearer(wrong))).status_code == 401


async def test_keys_are_rotated_while_serving(tmp_path):
    file = tmp_path / "keys"
    write(file, ALICE)
    client = client_with({"HUNYUAN_VLLM_API_KEY_FILE": str(file)})

    async def opens(key: str) -> bool:
        return (await client.get("/v1/models", headers=bearer(key))).status_code == 200

    assert await opens(ALICE) and not await opens(BOB)
    write(file, f"alice {ALICE}\nbob {BOB}\n")
    assert await opens(ALICE) and await opens(BOB)
    write(file, f"bob {BOB}\n")
    assert not await opens(ALICE) and await opens(BOB)
    # In place, too, and within the resolution of a file's time.
    file.write_text(f"bob {BOB[::-1]}\n")
    assert not await opens(BOB) and await opens(BOB[::-1])


@pytest.mark.parametrize("how", ["open to others", "empty", "gone", "garbage"])
async def test_a_bad_file_leaves_the_keys_as_they_were(tmp_path, how, caplog_vllm):
    file = tmp_path / "keys"
    write(file, ALICE)
    client = client_with({"HUNYUAN_VLLM_API_KEY_FILE": str(file)})
    spoil = {
        "open to others": lambda: (file.write_text(BOB), file.chmod(0o644)),
        "empty": lambda: file.write_text(""),
        "gone": file.unlink,
        "garbage": lambda: file.write_bytes(b"\xff\xfe a b c\n"),
    }
    spoil[how]()
    assert (await client.get("/v1/models", headers=bearer(ALICE))).status_code == 200
    assert (await client.get("/v1/models", headers=bearer(BOB))).status_code == 401
    said = [record for record in caplog_vllm.records if "keys are unchanged" in record.getMessage()]
    assert len({id(record) for record in said}) == 1 and str(file) in said[0].getMessage()
    write(file, BOB)
    assert (await client.get("/v1/models", headers=bearer(BOB))).status_code == 200
    assert (await client.get("/v1/models", headers=bearer(ALICE))).status_code == 401


def test_time_tells_no_key_from_another():
    ring = KeyRing({"VLLM_API_KEY": KEY})
    ring._use({f"name{number}": f"{KEY}{number}" for number in range(50)})
    guesses = {"none": b"x" * 29, "first": f"{KEY}0".encode(), "last": f"{KEY}49".encode(), "near": KEY.encode()}

    def seconds(guess: bytes) -> float:
        begun = time.thread_time()
        for _ in range(50):
            ring.owner(guess)
        return time.thread_time() - begun

    times = {name: [] for name in guesses}
    for _ in range(40):
        for name, guess in guesses.items():
            times[name].append(seconds(guess))
    medians = [median(taken) for taken in times.values()]
    assert max(medians) < 1.25 * min(medians), dict(zip(guesses, medians, strict=True))


def test_administration_is_for_the_only_key_or_the_one_named_so(tmp_path):
    only = KeyRing({"VLLM_API_KEY": KEY})
    assert only.may_administrate("default")
    file = tmp_path / "keys"
    write(file, f"alice {ALICE}\nadmin {BOB}\n")
    ring = KeyRing({"HUNYUAN_VLLM_API_KEY_FILE": str(file)})
    assert ring.may_administrate("admin") and not ring.may_administrate("alice")


def test_a_new_key_is_private_and_stays(tmp_path):
    file = tmp_path / "deep" / "api-key"
    create_key_file(file)
    keys = read_key_file(file)
    assert list(keys) == ["default"] and len(keys["default"]) >= 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    create_key_file(file)
    assert read_key_file(file) == keys
    assert [entry.name for entry in file.parent.iterdir()] == ["api-key"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file another user's")
def test_a_secret_that_the_system_mounts_may_be_readable_by_a_group(tmp_path):
    file = tmp_path / "keys"
    file.write_text(KEY)
    file.chmod(0o440)
    os.chown(file, 12345, 12345)
    assert read_key_file(file) == {"default": KEY}


@pytest.mark.parametrize(("content", "mode", "message"), [(KEY, 0o644, "chmod 600"), (KEY, 0o640, "chmod 600")])
def test_a_key_file_that_others_can_read_is_named(tmp_path, content, mode, message):
    file = tmp_path / "key"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(UserError, match=message) as raised:
        read_key_file(file)
    assert str(file) in str(raised.value)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("# only a comment\n", "holds no key"),
        (f"alice {KEY} more", "line 1"),
        (f"\nal*ce {KEY}", "line 2"),
        (f"alice {KEY}é", "line 1"),
        (f"{KEY}\n{ALICE}", "line 2: the name default is used above"),
        (f"alice {KEY}\nalice {ALICE}", "line 2: the name alice is used above"),
        (f"alice {KEY}\nbob {KEY}", "line 2: this key is listed above under another name"),
    ],
)
def test_what_is_no_list_of_keys(text, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_keys(text, "the file")
    assert KEY not in str(raised.value) and ALICE not in str(raised.value)


def test_an_absent_key_file_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_key_file(tmp_path / "key")
