"""What a start shows on a terminal, by a program that logs as vLLM does, and by a real server."""

import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from forked_programs import ENGINE_TOO
from serving import COMMAND, NOT_INHERITED, free_port

from hunyuan_vllm.server.terminal import STAGES, LogFile

RUNNER = """
import os, pathlib, sys
from hunyuan_vllm.server.launch import Launch
from hunyuan_vllm.server.process import Stop
from hunyuan_vllm.server.readiness import HealthStatus
from hunyuan_vllm.server.supervisor import run_once
from hunyuan_vllm.server.terminal import LogFile, Terminal
program, directory = sys.argv[1:]
launch = Launch([sys.executable, "-c", program, directory], {}, "127.0.0.1", 8020, "hunyuan")
health = lambda launch: HealthStatus("ready" if os.path.exists(directory + "/ready") else "silent")
terminal = Terminal(LogFile(pathlib.Path(directory, "logs", "serve.log")))
sys.exit(run_once(launch, os.environ, Stop(), health, terminal))
"""
LOGS = """
import pathlib, signal, sys
print("(APIServer pid=1) INFO version 0.32.0")
print("(Worker pid=2) INFO Starting to load model /m...")
print("(Worker pid=3) INFO Starting to load model /m...")
print("(Worker pid=2) INFO Loading weights took 0.05 seconds")
print("(EngineCore pid=4) INFO init engine (profile, create kv cache, warmup model) took 1.5 s", flush=True)
"""
STARTED = r"\[1/4\] starting vLLM  \d+ s\n\[2/4\] loading the model  \d+ s\n"


def on_a_terminal(argv: list[object], until: str = "", **environ: str) -> tuple[str, int]:
    """What a command shows on a terminal, and its exit status; it is told to stop once it has shown `until`."""
    controller, terminal = pty.openpty()
    variables = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    process = subprocess.Popen(
        list(map(str, argv)), stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        env={**variables, "TERM": "xterm", **environ},
    )  # fmt: skip
    os.close(terminal)
    shown, told = "", False
    try:
        while select.select([controller], [], [], 420)[0]:
            try:
                shown += os.read(controller, 1 << 16).decode()
            except OSError:  # nobody has the terminal open any more
                break
            if until and until in shown and not told:
                told = True
                process.send_signal(signal.SIGTERM)
        return re.sub(r"[^\n]*\r\x1b\[K", "", shown.replace("\r\n", "\n")), process.wait(60)
    finally:
        process.kill()
        os.close(controller)


def test_a_start_is_a_line_a_stage_and_then_the_ready_block(tmp_path: Path) -> None:
    program = LOGS + "pathlib.Path(sys.argv[1], 'ready').touch(); signal.pause()"
    shown, status = on_a_terminal([sys.executable, "-c", RUNNER, program, tmp_path], until="vllm chat")
    assert re.match(STARTED + r"\[3/4\] compiling and warming up  \d+ s\n\[4/4\] starting the API  \d+ s\n\n", shown)
    assert shown.count("/4]") == len(STAGES) and "INFO" not in shown
    assert shown.index("[4/4]") < shown.index("ready after") < shown.index("stopping the server")
    assert status == 128 + signal.SIGTERM  # this program just dies of it
    log = (tmp_path / "logs" / "serve.log").read_text()
    assert log.count("\n") == LOGS.count("print") and "Loading weights took" in log


def test_a_failed_start_shows_the_lines_that_matter_and_where_the_others_are(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        print("(Worker pid=2) INFO Starting to load model /m...")
        print("(Worker pid=2) ERROR [core.py:1] ValueError: checkpoint tensor 'x' is missing")
        print("(Worker pid=2) INFO bye")
        raise SystemExit(3)
    """)
    shown, status = on_a_terminal([sys.executable, "-c", RUNNER, program, tmp_path])
    assert status == 3 and re.match(STARTED, shown)
    assert "\n  (Worker pid=2) ERROR [core.py:1] ValueError: checkpoint tensor 'x' is missing\nhunyuan-vllm:" in shown
    assert f"the whole log is in {tmp_path}/logs/serve.log" in shown and "INFO" not in shown
    assert "the server stopped before it was ready: ValueError: checkpoint tensor 'x' is missing" in shown


def test_a_log_is_private_and_bounded_and_the_one_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "serve.log"
    LogFile(path).write(b"first\n")
    log = LogFile(path, limit=20)
    assert path.with_name("serve.log.1").read_bytes() == b"first\n"
    for number in range(10):
        log.write(b"line %d\n" % number)
    assert path.read_bytes() == b"line 8\nline 9\n"
    assert path.with_name("serve.log.1").read_bytes() == b"line 6\nline 7\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.unlink()
    (tmp_path / "logs").rename(tmp_path / "elsewhere")
    for _ in range(10):
        log.write(b"lost, which stops nothing\n")


@pytest.mark.server
@pytest.mark.slow
def test_a_server_started_from_a_terminal_leaves_the_ready_block_last(tmp_path: Path) -> None:
    port = free_port()
    environ = ENGINE_TOO | {"PORT": str(port), "XDG_STATE_HOME": str(tmp_path)}
    shown, status = on_a_terminal([COMMAND, "serve", "--enforce-eager"], until="vllm chat", **environ)
    log = tmp_path / "hunyuan-vllm" / f"serve-{port}.log"
    assert status == 0, shown
    assert f"its log is in {log}\n[1/4] starting vLLM" in shown and "INFO" not in shown
    assert re.search(r"\[4/4\] starting the API  \d+ s\n\nhunyuan-vllm: ready after \d+ s", shown)
    assert "Application startup complete" in log.read_text()
