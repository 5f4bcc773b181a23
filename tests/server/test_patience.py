"""The arithmetic of a supervisor: when a server counts as dead, how long to wait, and what else it does by itself."""

import os
import socket
import tempfile
import uuid
from pathlib import Path

import pytest

from hunyuan_vllm.server.health_status import Verdict
from hunyuan_vllm.server.process import notify, remove_deserted_sockets
from hunyuan_vllm.server.ray_cluster import RayCluster
from hunyuan_vllm.server.run import Patience
from hunyuan_vllm.server.supervisor import Backoff, RayNodes
from hunyuan_vllm.util.errors import UserError

START, HANG = 600.0, 60.0


def test_waits_double_up_to_a_limit():
    backoff = Backoff(first=1, most=60, forgiven_after=60)
    assert [backoff.after(None) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert backoff.failures == 8
    assert [backoff.after(ready_for) for ready_for in (59, 60, 1e6, 3)] == [60, 1, 1, 2]
    for _ in range(5000):
        assert backoff.after(None) <= 60


def when_killed(*answers: tuple[float, str]) -> tuple[float, str] | None:
    """When, and why, a server is killed that was started at 0 and answers so."""
    patience = Patience(START, HANG, now=0)
    for at, status in answers:
        if why := patience.worn_out(Verdict(status, f"is {status}"), at):
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
        ([(30, "ready"), (35, "dead"), (40, "dead")], 40, "is dead, but it goes on"),
    ],
)
def test_patience(answers, killed_at, why):
    killed = when_killed(*answers)
    assert (killed and killed[0]) == killed_at
    assert killed is None or why in killed[1]


class Clockwork:
    """Stands for the operator's wish: none for so many waits."""

    def __init__(self, waits):
        self.waits = waits

    @property
    def requested(self):
        return self.waits <= 0

    def sleep(self, seconds):
        self.waits -= 1


def finding(*answers):
    """A search for the cluster that comes to these, one after the other."""
    left = list(answers)

    def find(environ):
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return find, left


def test_a_cluster_is_whole_when_its_gpus_are_free(capsys):
    find, left = finding(
        UserError("no Ray cluster answers at 10.0.0.1:6379"),
        None,
        RayCluster(nodes=1, gpus=8, free_gpus=8),
        RayCluster(nodes=2, gpus=16, free_gpus=9),
        RayCluster(nodes=2, gpus=16, free_gpus=9),
        RayCluster(nodes=2, gpus=16, free_gpus=16),
    )
    RayNodes(16, {}, find).wait_until_whole(Clockwork(100))
    assert left == []
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert [line.split("Ray cluster: ")[1] for line in said] == [
        "no Ray cluster answers at 10.0.0.1:6379",
        "it is not running",
        "8 of 16 GPUs are free (8 on 1 node)",
        "9 of 16 GPUs are free (16 on 2 nodes)",
    ]


def test_an_operator_need_not_wait_for_the_cluster():
    find, left = finding(*[None] * 10)
    RayNodes(16, {}, find).wait_until_whole(Clockwork(3))
    assert len(left) == 7


def test_systemd_is_told(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(5)
        notify("READY=1", "STATUS=well", environ={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert systemd.recv(100) == b"READY=1\nSTATUS=well"
    name = f"hunyuan-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}")
        systemd.settimeout(5)
        notify("WATCHDOG=1", environ={"NOTIFY_SOCKET": f"@{name}"})
        assert systemd.recv(100) == b"WATCHDOG=1"
    notify("READY=1", environ={})
    notify("READY=1", environ={"NOTIFY_SOCKET": str(tmp_path / "gone")})


def test_only_deserted_sockets_of_vllm_are_removed():
    with tempfile.TemporaryDirectory() as folder:  # short: a socket's path has 107 characters
        names = {name: str(Path(folder, str(uuid.uuid4()))) for name in ("deserted", "in use", "file")}
        names["other"] = str(Path(folder, "deserted-but-of-another-program"))
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(names["in use"])
            listening.listen()
            for name in ("deserted", "other"):
                with socket.socket(socket.AF_UNIX) as dead:
                    dead.bind(names[name])
                    dead.listen()
            Path(names["file"]).touch()
            remove_deserted_sockets({**os.environ, "VLLM_RPC_BASE_PATH": folder})
        assert {name for name, path in names.items() if os.path.lexists(path)} == {"in use", "file", "other"}
