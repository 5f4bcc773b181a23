"""`hunyuan-vllm chat` without a server, and with one that misbehaves."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

from certificates import own_certificate
from fake_server import FakeServer, fake_server
from serving import COMMAND, free_port
from terminal import environment, run

from hunyuan_vllm.chat.terminal import printable


def test_no_server(tmp_path: Path) -> None:
    result = run("hello", home=tmp_path, PORT=str(free_port()))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "no server answers at http://127.0.0.1:" in result.stderr and "hunyuan-vllm serve" in result.stderr
    result = run("hello", "--url=localhost:8020", home=tmp_path)
    assert result.returncode == 2 and "as http://127.0.0.1:8020 is one" in result.stderr


def test_the_key_of_this_machines_server_is_shown_to_no_other(tmp_path: Path) -> None:
    made = tmp_path / ".config" / "hunyuan-vllm"
    made.mkdir(parents=True)
    (made / "api-key").write_text("bad\nfile\n")  # reading it would be an error
    (made / "api-key").chmod(0o600)
    near = run("hello", "--url=http://127.0.0.1:1", home=tmp_path)
    assert "api-key" in near.stderr
    far = run("hello", "--url=http://192.0.2.1.invalid", home=tmp_path)
    assert "no server answers" in far.stderr


def test_https_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    public, private = own_certificate(tmp_path)
    with fake_server(ssl_certfile=str(public), ssl_keyfile=str(private)) as secure:
        secure.text = "safe"
        assert run("hello", "--url", secure.url, "--ca", str(public), home=tmp_path).stdout == "safe\n"
        result = run("hello", "--url", secure.url, home=tmp_path)
    assert result.returncode == 2 and "is not trusted" in result.stderr and "--ca" in result.stderr
    result = run("hello", "--ca", str(private), home=tmp_path)
    assert result.returncode == 2 and "holds no certificates" in result.stderr


def test_an_answer_cannot_command_the_terminal(fake: FakeServer, tmp_path: Path) -> None:
    fake.text, fake.fault, fake.breaks_off = "a\x1b]52;c;ZXZpbA==\x07b\x1b[2Jc\x9bd\rе\n\tdone", None, False
    result = run("hello", "--url", fake.url, home=tmp_path)
    assert result.stdout == "a]52;c;ZXZpbA==b[2Jcdе\n\tdone\n"
    assert printable("盐🌊 naïve\n") == "盐🌊 naïve\n"


def test_the_rate_is_that_of_the_stream(fake: FakeServer, tmp_path: Path) -> None:
    fake.text, fake.fault, fake.breaks_off, fake.pace = "7 chars" * 30, None, False, 0.02
    try:
        result = run("hello", "--url", fake.url, home=tmp_path)
    finally:
        fake.pace = 0.001
    rate = re.search(r"9 tokens in, 30 out · ([\d.]+) tokens/s", result.stderr)
    assert rate and 5 < float(rate[1]) <= 52


def test_ctrl_c_ends_one_question(fake: FakeServer, tmp_path: Path) -> None:
    fake.text, fake.fault, fake.breaks_off, fake.pace = "7 chars" * 1000, None, False, 0.02
    try:
        with subprocess.Popen(
            [COMMAND, "chat", "hello", "--url", fake.url],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as asked:
            assert asked.stdout and asked.stderr
            assert asked.stdout.read(14) == "7 chars" * 2
            asked.send_signal(signal.SIGINT)
            assert asked.wait(timeout=20) == 130
            assert "stopped · 9 tokens in" in asked.stderr.read()
    finally:
        fake.pace = 0.001


def test_a_broken_stream_and_a_busy_server(fake: FakeServer, tmp_path: Path) -> None:
    fake.text, fake.fault, fake.breaks_off = "half an answer", None, True
    result = run("hello", "--url", fake.url, home=tmp_path)
    assert result.returncode == 1 and result.stdout == "half an answer\n"
    assert "the connection ended in the middle of the answer" in result.stderr
    fake.fault, fake.breaks_off = (429, "too many requests", {"Retry-After": "7"}), False
    result = run("hello", "--url", fake.url, home=tmp_path)
    assert result.returncode == 1 and "try again in 7 s" in result.stderr
    fake.fault = None
