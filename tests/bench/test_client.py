"""How the tools find a running server, its model and its key."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from certificates import own_certificate
from serving import free_port

from hunyuan_vllm.bench.client import connect, default_url, find_key
from hunyuan_vllm.util.errors import UserError

KEY = "the-key-of-this-test"


class Models(BaseHTTPRequestHandler):
    """Answers GET /v1/models for those who have the key."""

    def do_GET(self) -> None:
        accepted = self.headers["Authorization"] == f"Bearer {KEY}"
        self.send_response(200 if accepted else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "hunyuan", "max_model_len": 512, "root": "/m"}]}).encode())

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serving(certificate: tuple[Path, Path] | None = None) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Models)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, and no variable that names a server or a key."""
    for name in ("VLLM_API_KEY", "HUNYUAN_VLLM_API_KEY_FILE", "XDG_CONFIG_HOME", "HOST", "LOCAL_IP", "PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def made_by_serve(home: Path) -> Path:
    file = home / ".config" / "hunyuan-vllm" / "api-key"
    file.parent.mkdir(parents=True)
    file.touch(mode=0o600)
    file.write_text(KEY)
    return file


def test_a_model_is_found_and_the_key_is_not_shown() -> None:
    with serving() as url:
        for spelling in (url, f"{url}/", f"{url}/v1", f"{url}/v1/"):
            served = connect(spelling, KEY)
            assert (served.url, served.name, served.context, served.root) == (url, "hunyuan", 512, "/m")
        assert KEY not in repr(served)
        with pytest.raises(UserError, match="--tokenizer"):
            served.tokenizer()


@pytest.mark.parametrize(("key", "says"), [(None, "asks for an API key"), ("other", "does not accept this API key")])
def test_a_wrong_key(key: str | None, says: str) -> None:
    with serving() as url, pytest.raises(UserError, match=f"{says}.*--key-file"):
        connect(url, key)


def test_no_server() -> None:
    with pytest.raises(UserError, match="no server answers at .*hunyuan-vllm serve"):
        connect(f"http://127.0.0.1:{free_port()}", None)


@pytest.mark.parametrize("url", ["localhost:8020", "http://", "http://[::1", "http://localhost:port", "ftp://a"])
def test_a_malformed_url_is_refused(url: str, home: Path) -> None:
    made_by_serve(home)
    for ask in (lambda: connect(url, None), lambda: find_key(url, None, {"HOME": str(home)})):
        with pytest.raises(UserError, match="use the form http://127.0.0.1:8020"):
            ask()


def test_https_with_a_certificate_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public, private = own_certificate(tmp_path)
    with serving((public, private)) as url:
        with pytest.raises(UserError, match="is not trusted.*SSL_CERT_FILE"):
            connect(url, KEY)
        monkeypatch.setenv("SSL_CERT_FILE", str(public))
        assert connect(url, KEY).name == "hunyuan"


def test_the_key_of_this_machines_server_is_sent_to_no_other(home: Path) -> None:
    made_by_serve(home)
    assert find_key("http://127.0.0.1:8020", None, {"HOME": str(home)}) == KEY
    assert find_key("http://192.0.2.1:8020", None, {"HOME": str(home)}) is None


def test_a_key_that_was_named_comes_first(home: Path, tmp_path: Path) -> None:
    made_by_serve(home)
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_text("alice from-the-file\n")
    environ = {"HOME": str(home), "VLLM_API_KEY": "from-the-environment"}
    assert find_key("http://127.0.0.1:8020", file, environ) == "from-the-file"
    assert find_key("http://127.0.0.1:8020", None, environ) == "from-the-environment"


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({}, "http://127.0.0.1:8020"),
        ({"HOST": "0.0.0.0", "PORT": "9000"}, "http://127.0.0.1:9000"),
        ({"HOST": "::"}, "http://[::1]:8020"),
        ({"LOCAL_IP": "10.0.0.5"}, "http://10.0.0.5:8020"),
    ],
)
def test_the_address_is_that_of_serve_with_the_same_variables(environ: dict[str, str], url: str) -> None:
    assert default_url(environ) == url
