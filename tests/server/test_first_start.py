"""A first start beyond loopback makes a key, says so, and deploy/openapi.sh finds it."""

import json
import os
import signal
import stat
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from forked_programs import Program
from serving import COMMAND, NOT_INHERITED, free_port

from hunyuan_vllm.server.keys import read_key_file

SCRIPT = Path(__file__).parents[2] / "deploy" / "openapi.sh"


def environment(config_home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    return {**kept, "XDG_CONFIG_HOME": str(config_home), **more}


def start_and_stop(config_home: Path) -> str:
    """What a start on all addresses says before it loads a model, which is when it is stopped."""
    environ = environment(config_home, HOST="0.0.0.0", PORT=str(free_port()))
    process = Program([COMMAND, "serve"], environ, start_new_session=True)
    said = ""
    for line in process.stdout:
        said += line
        if "hunyuan-vllm: starting" in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return said


def test_a_first_start_makes_a_key_and_the_next_keeps_it(tmp_path):
    said = start_and_stop(tmp_path)
    file = tmp_path / "hunyuan-vllm" / "api-key"
    assert f"a new API key is in {file}" in said
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    (key,) = read_key_file(file).values()
    assert key not in said
    assert "new API key" not in start_and_stop(tmp_path)
    assert list(read_key_file(file).values()) == [key]


class Answers(BaseHTTPRequestHandler):
    """Stands for a server: notes the keys that it is shown."""

    def do_POST(self) -> None:
        self.server.shown.append(self.headers["Authorization"])
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"tokens": [7], "choices": []}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def noting_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.shown = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("lone-key\n", "lone-key"),
        ("lone-key", "lone-key"),
        ("# who may\n\nalice  key-of-alice \nbob key-of-bob\n", "key-of-alice"),
        ("  admin\tkey-of-admin", "key-of-admin"),
    ],
)
def test_the_script_takes_the_first_key_of_the_file(tmp_path, text, key):
    file = tmp_path / "hunyuan-vllm" / "api-key"
    file.parent.mkdir()
    file.write_text(text)
    with noting_server() as server:
        variables = environment(tmp_path, PORT=str(server.server_port))
        asked = subprocess.run(["sh", SCRIPT, "--raw"], env=variables, capture_output=True, text=True, timeout=60)
    assert asked.returncode == 0, asked.stderr
    assert server.shown == [f"Bearer {key}"] * 2
    file.chmod(0o600)
    assert next(iter(read_key_file(file).values())) == key
