"""An operator at one of the test hosts who runs deploy/login_ssh.py, and what he sees."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosts import HOME, Host, Sshd

PORT = 36000
PASSWORD = 'it\'s "the" $PASSWORD `id` \\ ü'  # whatever passes it on must quote it, or not need to
PROGRAM = Path(sys.executable).with_name("hunyuan-vllm")
SCRIPT = Path(__file__).parents[2] / "deploy" / "login_ssh.py"


@dataclass(frozen=True)
class Outcome:
    """What a run printed with --json, and its messages."""

    status: int
    report: dict[str, Any]
    messages: str

    def host(self, name: str) -> dict[str, Any]:
        return next(host for host in self.report["hosts"] if host["host"] == name)

    def problems(self, name: str) -> str:
        """What is wrong with a host, with the remedies."""
        return "\n".join(f"{problem['what']}: {problem['remedy']}" for problem in self.host(name)["problems"])

    def failed(self) -> set[tuple[str, str]]:
        """The pairs that were not verified."""
        return {(pair["from"], pair["to"]) for pair in self.report["pairs"] if not pair["ok"]}


def command(ips: str, *more: str) -> list[str]:
    """What the operator types."""
    return [sys.executable, str(SCRIPT), "--ips", ips, "--port", str(PORT), *more]


def log_in(at: Host, ips: str, *more: str, **environ: str) -> Outcome:
    """Run the command at a host, without a terminal."""
    done = at.run(*command(ips, "--json", *more), check=False, env=at.environment(**environ))
    assert "Traceback" not in done.stderr, done.stderr
    return Outcome(done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr)


def cluster(at: Host, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `hunyuan-vllm cluster …` at a host, without a terminal."""
    done: subprocess.CompletedProcess[str] = at.run(
        PROGRAM, "cluster", *words, check=False, env=at.environment(**environ), timeout=120
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def at_terminal(at: Host, ips: str, answers: list[tuple[str, str]], *more: str) -> tuple[int, str]:
    """Run it at a terminal: each answer is typed when its question has appeared. Status and all that was shown."""
    pid, terminal = pty.fork()
    if pid == 0:
        argv = at.command(*command(ips, *more))
        os.execvpe(argv[0], argv, at.environment(TERM="dumb", COLUMNS="160"))
    shown, seen = "", 0
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.2)[0]:
                try:
                    shown += os.read(terminal, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    break
            if answers and answers[0][0] in shown[seen:]:
                seen = len(shown)
                os.write(terminal, answers.pop(0)[1].encode() + b"\n")
    finally:
        os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown


def options(*servers: Sshd) -> list[str]:
    """That vouch for these servers' keys."""
    return ["--fingerprints", ",".join(f"{server.host.address}={server.fingerprint}" for server in servers)]


def ssh_state(host: Host, home: str = HOME) -> str:
    """All there is below .ssh, down to times, inodes and content."""
    return host.sh(
        f"cd {home}; [ ! -e .ssh ] || find .ssh -printf '%p %m %T@ %C@ %i %l\\n' -type f -exec sha256sum {{}} +"
    )
