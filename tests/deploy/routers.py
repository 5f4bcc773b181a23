"""HAProxy as an operator starts it, for tests."""

import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from serving import free_port
from waiting import eventually

CONFIG = Path(__file__).parents[2] / "deploy/router/haproxy.cfg"
HAPROXY = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin") or ""
needs_haproxy = pytest.mark.skipif(
    not HAPROXY, reason="haproxy is not installed (Debian, Ubuntu: apt-get install haproxy)"
)
KEY = "a-key-of-the-tests"


class Router:
    """A running router, and what it says of itself."""

    def __init__(self, port: int, status: int) -> None:
        self.status = httpx.Client(base_url=f"http://127.0.0.1:{status}", trust_env=False, timeout=30)
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {KEY}"}, trust_env=False,
            timeout=120, limits=httpx.Limits(max_connections=64),
        )  # fmt: skip

    def metric(self, name: str, replica: str, more: str = "") -> int:
        pattern = rf'^{name}{{proxy="replicas",server="{replica}"{more}}} (\d+)$'
        return int(re.findall(pattern, self.status.get("/metrics").text, re.M)[0])

    def is_up(self, replica: str) -> bool:
        return self.metric("haproxy_server_status", replica, ',state="UP"') == 1

    def ask(self, *texts: str, **options: object) -> httpx.Response:
        """A chat whose messages alternate, after a system message."""
        roles = ["system", *["user", "assistant"] * len(texts)]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        request = {"model": "hunyuan", "temperature": 0, "max_tokens": 1, "messages": messages, **options}
        return self.client.post("/v1/chat/completions", json=request)


@contextmanager
def running_router(*replicas: str) -> Iterator[Router]:
    """HAProxy with the operator's own file, before replicas given as HOST:PORT."""
    port, status = free_port(), free_port()
    names = {f"REPLICA_{number}": replica for number, replica in enumerate(replicas, 1)}
    listening = {"ROUTER_BIND": f"127.0.0.1:{port}", "ROUTER_STATUS": f"127.0.0.1:{status}"}
    process = subprocess.Popen(
        [HAPROXY, "-db", "-f", CONFIG], env={"PATH": os.environ["PATH"], **names, **listening},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    router = Router(port, status)

    def answers() -> bool:
        assert process.poll() is None
        try:
            return router.status.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    try:
        eventually(answers)
        yield router
    finally:
        process.terminate()
        process.wait(timeout=10)


class Failing(BaseHTTPRequestHandler):
    """Ready as far as anyone has noticed; counts the requests that reach any, and fails as its server says."""

    received = 0

    def do_GET(self) -> None:
        self.answer(200)

    def do_POST(self) -> None:
        type(self).received += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.status is None:  # type: ignore[attr-defined]
            self.connection.shutdown(socket.SHUT_RDWR)  # as a process that is killed does
        else:
            self.answer(self.server.status)  # type: ignore[attr-defined]

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def failing(*statuses: int | None) -> Iterator[list[str]]:
    """Addresses of replicas that answer with these statuses; None: the connection ends without an answer."""
    Failing.received = 0
    with ExitStack() as stack:
        addresses = []
        for status in statuses:
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Failing))
            server.status = status  # type: ignore[attr-defined]
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            addresses.append(f"127.0.0.1:{server.server_port}")
        yield addresses
