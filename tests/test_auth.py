"""The API key: asked for on every path but /health, kept private, never overwritten."""

import stat

import httpx
import pytest

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.server.auth import RequireApiKey, create_key_file, read_key_file

KEY = "a-key-of-32-characters-or-so"
WRONG = [f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer ", f"Bearer é{KEY}"]


async def application(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"inside"})


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    transport = httpx.ASGITransport(app=RequireApiKey(application))
    return httpx.AsyncClient(transport=transport, base_url="http://server")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/tokenize", "/invocations", "/pause", "/metrics"])
async def test_every_path_wants_the_key(client, path):
    assert (await client.post(path)).status_code == 401
    assert (await client.post(path, headers={"Authorization": f"Bearer {KEY}"})).status_code == 200


@pytest.mark.parametrize("value", WRONG)
async def test_nothing_but_the_key_opens(client, value):
    response = await client.get("/v1/models", headers={"Authorization": value.encode()})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert "inside" not in response.text
    assert KEY not in response.text


async def test_health_and_preflight_need_no_key(client):
    assert (await client.get("/health")).status_code == 200
    assert (await client.options("/v1/chat/completions")).status_code == 200
    assert (await client.get("/health/../v1/models")).status_code == 401


async def test_a_websocket_is_closed(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    sent = []

    async def send(message):
        sent.append(message)

    await RequireApiKey(application)({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_without_any_key_the_server_does_not_start(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("HUNYUAN_VLLM_API_KEY_FILE", raising=False)
    with pytest.raises(UserError, match="there is none"):
        RequireApiKey(application)


def test_a_new_key_is_private_and_stays(tmp_path):
    file = tmp_path / "deep" / "api-key"
    create_key_file(file)
    key = read_key_file(file)
    assert len(key) >= 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    create_key_file(file)
    assert read_key_file(file) == key
    assert [entry.name for entry in file.parent.iterdir()] == ["api-key"]


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [(KEY, 0o644, "chmod 600"), (KEY, 0o640, "chmod 600"), ("", 0o600, "one line"), ("a b", 0o600, "one line")],
)
def test_a_bad_key_file_is_named(tmp_path, content, mode, message):
    file = tmp_path / "key"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(UserError, match=message) as raised:
        read_key_file(file)
    assert str(file) in str(raised.value)
    assert KEY not in str(raised.value)


def test_an_absent_key_file_is_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_key_file(tmp_path / "key")
