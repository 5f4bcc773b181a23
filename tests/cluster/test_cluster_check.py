"""`hunyuan-vllm cluster check` between three real hosts with real SSH servers."""

import json
import re
import subprocess
import sys

import pytest
from hosts import HOME
from operator_at_host import PORT, cluster

from hunyuan_vllm.cli.cluster import app
from hunyuan_vllm.util.errors import UserError

MODEL = f"{HOME}/model"
LATE_CLOCK = """#!/bin/sh
exec /bin/date -d '90 seconds ago' "$@"
"""
# Has a port, and answers no one there.
BIND = """
import socket, sys, time
held = socket.socket()
held.bind((sys.argv[1], int(sys.argv[2])))
print("held", flush=True)
time.sleep(60)
"""
# Answers as nvidia-smi for one GPU per name.
GPUS = """#!/bin/sh
case "$*" in *--query-gpu=index*) ;; *) exit 0 ;; esac
index=0
for name in {names}; do
    echo "$index, NVIDIA $name, 550.54, 9.0, 97871, 4, [N/A], 0"
    index=$((index + 1))
done
"""


class Checked:
    """What `cluster check --json` found."""

    def __init__(self, at, ips: str, *more: str) -> None:
        done = cluster(at, "check", "--hosts", ips, "--ssh-port", str(PORT), "--json", *more)
        assert done.stdout, done.stderr
        report = json.loads(done.stdout)
        self.status, self.sound = done.returncode, report["sound"]
        self.sections = {section["title"]: section["findings"] for section in report["sections"]}

    def texts(self, title: str, subject: str, status: str = "problem") -> str:
        """Texts, items and remedies of all findings about a subject that have this status."""
        found = [one for one in self.sections[title] if (one["subject"], one["status"]) == (subject, status)]
        return "\n".join("\n".join((one["text"], *one["items"], one["remedy"])) for one in found)

    @property
    def problems(self) -> set[tuple[str, str]]:
        """Section and subject of each problem."""
        found = ((title, one) for title, findings in self.sections.items() for one in findings)
        return {(title, one["subject"]) for title, one in found if one["status"] == "problem"}


@pytest.fixture
def with_model(joined):
    for host in joined.hosts:
        host.sh(f"mkdir -p {MODEL}; cd {MODEL}; echo '{{}}' >config.json; head -c 5000 /dev/zero >model.safetensors")
    yield joined
    for host in joined.hosts:
        host.sh(f"rm -rf {MODEL} /usr/local/bin/nvidia-smi /usr/local/bin/date")


def listeners(host) -> str:
    """Local addresses of the TCP sockets that listen, and whether a Python runs."""
    return host.sh("awk '$4 == \"0A\" {print $2}' /proc/net/tcp; cat /proc/[0-9]*/comm | grep -c python || true")


def test_hosts_that_can_be_one(with_model):
    a = with_model.hosts[0]
    before = [listeners(host) for host in with_model.hosts]
    files = {host.sh("ls -A ~ /tmp") for host in with_model.hosts}
    done = Checked(a, with_model.ips, "--model", MODEL, "--ifname", "eth0", "--gpus-per-node", "0")
    assert (done.status, done.sound) == (0, True), done.sections
    for subject in ("Python", "vllm", "hunyuan-vllm", "ray"):
        assert "everywhere" in done.texts("Alike", subject, "ok")
    assert "the same 2 files on each host" in done.texts("Alike", "checkpoint", "ok")
    assert "each host reaches Ray's ports, and one that the system chose" in done.texts("Between hosts", "ports", "ok")
    assert "within 0.0" in done.texts("Between hosts", "clocks", "ok")
    assert set(done.sections) == {"Hosts", "Alike", "Between hosts", *(host.address for host in with_model.hosts)}
    # Nothing stays behind, neither a held port nor a file.
    assert [listeners(host) for host in with_model.hosts] == before
    assert {host.sh("ls -A ~ /tmp") for host in with_model.hosts} == files


def test_all_that_differs_is_named(with_model):
    a, b, c = with_model.hosts
    b.sh(f"cd {MODEL}; echo '[]' >config.json; truncate -s 4999 model.safetensors; touch more.json")
    c.sh(
        "cat >/usr/local/bin/date; chmod 755 /usr/local/bin/date",
        input="#!/bin/sh\nexec /bin/date -d '90 seconds ago' \"$@\"\n",
    )
    for host, names in ((a, "H20 H20"), (b, "H20 H20"), (c, "H20")):
        host.sh("cat >/usr/local/bin/nvidia-smi; chmod 755 /usr/local/bin/nvidia-smi", input=GPUS.format(names=names))
    # b and c do not find each other, though a finds both; something of c's is in a port's way.
    b.sh(f"ip route add unreachable {c.address}/32")
    hold = f"import socket, time; s = socket.socket(); s.bind(('{c.address}', 6381)); print(flush=True); time.sleep(60)"
    holder = c.start(sys.executable, "-c", hold, stdout=-1)
    holder.stdout.readline()
    try:
        done = Checked(a, with_model.ips, "--model", MODEL, "--ifname", "bond1", "--gpus-per-node", "2",
                       "--timeout", "4")  # fmt: skip
    finally:
        holder.kill()
        holder.communicate()
        b.sh(f"ip route del unreachable {c.address}/32")
    assert (done.status, done.sound) == (1, False)
    files = done.texts("Alike", "checkpoint")
    for part in ("config.json: different content on", "4999 bytes on", "more.json: on", f"copy {MODEL} from a host"):
        assert part in files
    skew = done.texts("Between hosts", "clocks")
    assert "90." in skew and f"ahead of {c.address}" in skew and "set-ntp" in skew
    gpus = done.texts("Alike", "GPUs")
    assert "2 × NVIDIA H20 (96 GiB, driver 550.54) on 10.77.0.1, 10.77.0.2" in gpus
    assert f"{c.address} has 1 GPU of 2" in gpus
    assert f"{a.address} has no interface bond1; {a.address} is on eth0" in done.texts("Between hosts", "interface")
    ports = done.texts("Between hosts", "ports")
    assert f"{b.address} does not reach 10 ports of {c.address}" in ports and "No route to host" in ports
    assert f"{a.address} does not reach 1 port of {c.address}\n6381: Connection refused" in ports
    assert f"{a.address} does not reach 1 port of {b.address}" not in ports
    assert f"6381 of {c.address} is used by another program" in done.texts("Between hosts", "ports", "warning")
    assert done.problems == {("Alike", "checkpoint"), ("Alike", "GPUs"), ("Between hosts", "clocks"),
                             ("Between hosts", "interface"), ("Between hosts", "ports")}  # fmt: skip


def test_what_cannot_be_looked_at_is_named_and_the_rest_is(joined):
    a, b, c = joined.hosts
    b.sh("echo >~/.ssh/authorized_keys")
    gone = "10.77.0.99"
    ips = ",".join((a.address, b.address, "hostc", gone))
    done = Checked(a, ips, "--timeout", "4")
    assert (done.status, done.sound) == (1, False)
    assert "it accepts none of this user's keys" in done.texts("Hosts", b.address)
    assert "its host key is not known here\nrun python3 deploy/login_ssh.py first" in done.texts("Hosts", "hostc")
    assert "unreachable" in done.texts("Hosts", gone) or "no answer" in done.texts("Hosts", gone)
    assert done.texts("Hosts", a.address, "ok").startswith("logged in; 10.77.0.1 is on eth0")
    shown = cluster(
        a, "check", "--hosts", f"{a.address},{c.address}", "--ssh-port", str(PORT), "--python", "/opt/python"
    )
    assert shown.returncode == 1
    assert (
        f"PROBLEM  {c.address}: /opt/python cannot run hunyuan_vllm.cluster.probe: no Python at /opt/python"
        in shown.stdout
    )
    assert "2 problems" in shown.stdout and "hosts: 2 done in" in shown.stderr


def test_nodes_are_looked_at_without_loading_the_engine():
    script = "import sys, hunyuan_vllm.cluster.probe; print({'torch', 'vllm', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hosts", "127.0.0.1,10.0.0.2"], "127.0.0.1 is a different machine on every host"),
        (["--hosts", ","], "--hosts names no host"),
        (["--hosts", "10.0.0.1", "--user", "a b"], "--user 'a b' is not a user name"),
    ],
)
def test_mistakes(words, said):
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        app(["check", *words], standalone_mode=False)
    assert "\n" not in str(raised.value)
