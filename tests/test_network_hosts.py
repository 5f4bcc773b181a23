"""The hosts that tests of several machines run on: apart from each other, joined by a network, and gone when done."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import HOME, Network, Sshd, need_hosts, requirements
from waiting import eventually

TESTS = Path(__file__).parent
REACH = "import socket, sys; socket.create_connection((sys.argv[1], 2222), 3).close()"


@pytest.fixture(scope="module")
def pair():
    need_hosts()
    with Network() as network:
        yield network, network.add("left"), network.add("right")


def reaches(host, address: str) -> bool:
    return host.run(sys.executable, "-c", REACH, address, check=False).returncode == 0


def test_each_has_its_own_name_files_and_processes(pair):
    _, left, right = pair
    assert left.sh("hostname") == "left\n"
    left.sh("touch ~/mine /etc/mine /tmp/mine /dev/shm/mine")
    assert right.sh("ls ~/mine /etc/mine /tmp/mine /dev/shm/mine 2>/dev/null || true") == ""
    assert not any(Path(directory, "mine").exists() for directory in (HOME, "/etc", "/tmp", "/dev/shm"))
    assert left.sh("cat /proc/1/comm") == "sh\n"
    assert str(os.getpid()) not in left.sh("ls /proc").split()
    assert right.run(sys.executable, "-c", "import paramiko, pytest").returncode == 0


@pytest.mark.parametrize("base", ["/usr", "/usr/lib"])
def test_the_machine_keeps_its_files_where_python_is_the_system_s(base: str, monkeypatch):
    need_hosts()
    monkeypatch.setattr(sys, "base_prefix", base)
    mine = Path(base) / "written-by-a-host"
    try:
        with Network() as network:
            network.add("left").sh(f"touch {mine}; test -x /usr/bin/env")
        assert not mine.exists()
    finally:
        mine.unlink(missing_ok=True)


def test_partition_power_off_and_return(pair):
    network, left, right = pair
    Sshd(right, 2222, "password")
    assert reaches(left, right.address) and reaches(left, "right") and reaches(left, right.address6)
    right.unplug()
    assert not reaches(left, right.address) and right.alive
    right.plug()
    assert reaches(left, right.address) and reaches(left, right.address6)
    right.sh("touch ~/mine")
    right.power_off()
    assert not right.alive and not reaches(left, right.address)
    again = network.add("right")
    assert again.address == right.address
    Sshd(again, 2222, "password")
    assert reaches(left, "right")
    assert again.sh("ls ~/mine 2>/dev/null || true") == ""


def test_orphans_are_reaped(pair):
    _, left, _ = pair
    left.sh("(sleep 0.1 &) ; exec true")
    eventually(lambda: " Z" not in left.sh("cat /proc/[0-9]*/stat | cut -d ')' -f 2"))


def test_nothing_is_left_when_the_tests_are_killed():
    need_hosts()
    script = (
        f"import sys, time; sys.path.insert(0, {str(TESTS)!r}); from hosts import HOME, Network, Sshd\n"
        "with Network() as network:\n"
        "    hosts = [network.add('left'), network.add('right')]\n"
        "    Sshd(hosts[0], 2222, 'password')\n"
        "    hosts[1].start('sleep', '7654321')\n"
        "    print(*(host.pid for host in hosts), flush=True)\n"
        "    time.sleep(600)\n"
    )
    mounts = Path("/proc/self/mounts").read_text()
    maker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    pids = [int(word) for word in maker.stdout.readline().split()]
    namespaces = {_namespace(pid) for pid in pids}
    # Two inits with their sleeps, the server, and the other sleep.
    inside = eventually(lambda: len(found := [p for p in _pids() if _namespace(p) in namespaces]) >= 6 and found)
    maker.send_signal(signal.SIGKILL)
    maker.communicate()
    eventually(lambda: not set(inside) & set(_pids()))
    assert Path("/proc/self/mounts").read_text() == mounts


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(requirements.os, "geteuid", lambda: 1000)
    assert requirements.missing.__wrapped__() == "hosts in namespaces need root: run the tests as root"
    monkeypatch.setattr(requirements.os, "geteuid", lambda: 0)
    monkeypatch.setattr(requirements, "PATH", "/nonexistent")
    assert requirements.missing.__wrapped__() == "hosts in namespaces need ip: install the Debian package iproute2"
