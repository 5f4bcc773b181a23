"""When a server is killed as hung, the back-off between restarts, messages to systemd, and stale sockets."""

import os
import socket
import tempfile
import uuid
from pathlib import Path

import pytest

from hunyuan_vllm.server.process import notify_systemd, remove_stale_sockets
from hunyuan_vllm.server.readiness import HealthMonitor, HealthStatus
from hunyuan_vllm.server.supervisor import RestartPolicy

START, HANG = 600.0, 60.0


def test_waits_double_up_to_a_limit():
    policy = RestartPolicy(first_wait=1, max_wait=60)
    assert [policy.wait(failures) for failures in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert policy.wait(5000) == 60


def when_killed(*answers: tuple[float, str]) -> tuple[float, str] | None:
    """When, and why, a server is killed that was started at 0 and answers so."""
    monitor = HealthMonitor(START, HANG, now=0)
    for at, status in answers:
        if why := monitor.reason_to_kill(HealthStatus(status, f"is {status}"), at):
            return at, why
    return None


def every(seconds, status, begin, end):
    return [(float(at), status) for at in range(begin, end, seconds)]


@pytest.mark.parametrize(
    ("answers", "killed_at", "why"),
    [
        ([*every(5, "silent", 0, 595)], None, ""),
        ([*every(5, "silent", 0, 700)], 600, "not ready after 600 s"),
        ([(30, "ready"), *every(5, "ready", 35, 3000)], None, ""),
        ([(30, "ready"), *every(5, "busy", 35, 3000)], None, ""),
        ([(30, "ready"), *every(5, "draining", 35, 3000)], None, ""),
        ([(30, "ready"), *every(5, "stalled", 35, 300)], 90, "it hangs: is stalled, for 60 s"),
        ([(30, "ready"), *every(5, "silent", 35, 300)], 90, "it hangs: is silent"),
        ([(30, "ready"), *every(5, "failed", 35, 300)], 90, "it hangs: is failed"),
        # Recovered in time.
        ([(30, "ready"), *every(5, "stalled", 35, 90), (90, "ready"), *every(5, "stalled", 95, 145)], None, ""),
        # Long prompts: ten times as long, and a standstill among them counts from when it began.
        ([(30, "ready"), *every(5, "slow", 35, 630)], None, ""),
        ([(30, "ready"), *every(5, "slow", 35, 900)], 630, "it hangs: is slow, for 600 s"),
        ([(30, "ready"), *every(5, "slow", 35, 300), *every(5, "stalled", 300, 500)], 355, "it hangs: is stalled"),
        # The engine is gone: the server has a moment for its last words.
        ([(30, "ready"), (35, "dead"), (39, "dead")], None, ""),
        ([(30, "ready"), (35, "dead"), (40, "dead")], 40, "is dead, but it does not exit"),
    ],
)
def test_when_a_server_is_killed(answers, killed_at, why):
    killed = when_killed(*answers)
    assert (killed and killed[0]) == killed_at
    assert killed is None or why in killed[1]


def test_systemd_is_told(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(5)
        notify_systemd("READY=1", "STATUS=well", environ={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert systemd.recv(100) == b"READY=1\nSTATUS=well"
    name = f"hunyuan-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}")
        systemd.settimeout(5)
        notify_systemd("WATCHDOG=1", environ={"NOTIFY_SOCKET": f"@{name}"})
        assert systemd.recv(100) == b"WATCHDOG=1"
    notify_systemd("READY=1", environ={})
    notify_systemd("READY=1", environ={"NOTIFY_SOCKET": str(tmp_path / "gone")})


def test_only_deserted_sockets_of_vllm_are_removed():
    with tempfile.TemporaryDirectory() as directory:  # short: a socket's path has 107 characters
        names = {name: str(Path(directory, str(uuid.uuid4()))) for name in ("deserted", "in use", "file")}
        names["other"] = str(Path(directory, "deserted-but-of-another-program"))
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(names["in use"])
            listening.listen()
            for name in ("deserted", "other"):
                with socket.socket(socket.AF_UNIX) as dead:
                    dead.bind(names[name])
                    dead.listen()
            Path(names["file"]).touch()
            remove_stale_sockets({**os.environ, "VLLM_RPC_BASE_PATH": directory})
        assert {name for name, path in names.items() if os.path.lexists(path)} == {"in use", "file", "other"}
