"""The password of deploy/login_ssh.py: asked for without an echo, sent to hosts, and seen by nobody else."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hosts import HOME
from operator_at_host import PASSWORD, at_terminal, command, log_in, options

ROOT = Path(__file__).parents[2]
SECRET = "s3cret with spaces"

# Stands in for ssh and ssh-keygen on a host: writes down what it was started with, then is the real one.
WRAPPER = """#!/bin/sh
{ tr '\\0' '\\n' </proc/$$/cmdline; tr '\\0' '\\n' </proc/$$/environ; } >>/var/log/started
exec /usr/bin/${0##*/} "$@"
"""


@pytest.fixture
def watched(trio):
    """The hosts, with ssh and ssh-keygen writing down their arguments and environment."""
    for host in trio.hosts:
        host.run("tee", "/usr/local/bin/ssh", "/usr/local/bin/ssh-keygen", input=WRAPPER)
        host.sh("chmod 755 /usr/local/bin/ssh*; rm -f /var/log/started")
    yield trio
    for host in trio.hosts:
        host.sh("rm /usr/local/bin/ssh /usr/local/bin/ssh-keygen")


def two(trio) -> str:
    return ",".join(host.address for host in trio.hosts[:2])


def assert_nowhere(trio):
    """No file of any host has the password, but the operator's own password file."""
    for host in trio.hosts[:2]:
        started = host.sh("cat /var/log/started")
        assert "BatchMode=yes" in started and PASSWORD not in started and "PASSWORD=" not in started
        # Not in the bytecode of these tests.
        search = f"grep -rlF --exclude-dir=__pycache__ -f {HOME}/password"
        found = host.sh(f"{search} {HOME} /home /etc /var/log /var/tmp /tmp /run || true").split()
        assert found == [f"{HOME}/password"]


def test_on_the_command_line_it_is_warned_of_and_wiped(watched):
    a = watched.hosts[0]
    run = a.start(
        *command(two(watched), "--password", PASSWORD, *options(*watched.servers[:2])),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    first = run.stderr.readline()
    assert "warning: --password" in first and "use --password-file" in first
    seen = set()
    while run.poll() is None:
        for process in psutil.Process(run.pid).children(recursive=True):
            try:
                seen.add("\0".join(process.cmdline()))
                assert PASSWORD not in "\0".join(process.environ().values())
            except psutil.Error:
                continue
        time.sleep(0.03)
    out, errors = run.communicate()
    assert run.returncode == 0, errors
    assert any("login_ssh.py" in line for line in seen)
    assert not any(PASSWORD in line or f"--password\0{PASSWORD[0]}" in line for line in seen)
    assert PASSWORD not in out + errors
    assert_nowhere(watched)


def test_in_the_environment_no_other_program_inherits_it(watched):
    a = watched.hosts[0]
    done = log_in(a, two(watched), *options(*watched.servers[:2]), HUNYUAN_SSH_PASSWORD=PASSWORD)
    assert done.status == 0, done
    assert_nowhere(watched)


def test_at_a_terminal_keys_are_confirmed_once_and_the_password_is_asked_for_once(trio):
    a = trio.hosts[0]
    status, shown = at_terminal(a, two(trio), [("Type yes", "yes"), ("password of root on", PASSWORD)])
    assert status == 0, shown
    for server in trio.servers[:2]:
        assert server.fingerprint in shown.partition("Type yes")[0]
    assert "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub" in shown
    assert shown.count("Type yes") == shown.count("password of root on") == 1
    assert "confirmed by you" in shown and "4 of 4 logins verified" in shown
    assert PASSWORD not in shown
    status, shown = at_terminal(a, two(trio), [])
    assert status == 0 and "Type yes" not in shown and "nothing was changed" in shown


@pytest.mark.parametrize("answer", ["no", "y"])
def test_anything_but_yes_leaves_the_hosts_out(trio, answer):
    a, b = trio.hosts[:2]
    status, shown = at_terminal(a, b.address, [("Type yes", answer)])
    assert status == 1
    assert "was not confirmed" in shown and "password of" not in shown
    assert not b.sh(f"ls -A {HOME}/.ssh 2>/dev/null || true")


def test_take_option_wipes_every_form_from_the_process():
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from login_ssh import take_option;"
        "value = take_option('--password'); print(repr(value)); print(sys.argv[1:]);"
        "print(open('/proc/self/cmdline').read().rstrip(chr(0)).split(chr(0))[4:])"
    )

    def run(*arguments: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", script, ROOT / "deploy", *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    assert run("--ips", "a,b", "--password", SECRET, "--yes") == [
        repr(SECRET), "['--ips', 'a,b', '--yes']", "['--ips', 'a,b', '--password', '*', '--yes']",
    ]  # fmt: skip
    assert run(f"--password={SECRET}", "--port", "22") == [
        repr(SECRET), "['--port', '22']", "['--password=*', '--port', '22']",
    ]  # fmt: skip
    assert run("--password", "first", f"--password={SECRET}")[0::2] == [
        repr(SECRET),
        "['--password', '*', '--password=*']",
    ]
    assert run("--password-file", "x") == ["None", "['--password-file', 'x']", "['--password-file', 'x']"]
    assert run("--password") == ["None", "['--password']", "['--password']"]


def test_without_the_libraries_the_environment_of_the_checkout_takes_over(tmp_path):
    """And gets the password neither by argument nor by variable."""
    (tmp_path / "deploy").mkdir()
    shutil.copy(ROOT / "deploy" / "login_ssh.py", tmp_path / "deploy")
    (tmp_path / "deploy" / "setup_env.sh").write_text("echo set up >&2\n")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@"; env; for last; do :; done; cat "${last#*=}"; stat -Lc %a "${last#*=}"\n'
    )
    python.chmod(0o755)
    bare = [sys.executable, "-I", "-S", tmp_path / "deploy" / "login_ssh.py"]
    done = subprocess.run(
        [*bare, "--ips", "a,b", "--password", SECRET],
        capture_output=True, text=True, env={**os.environ, "HUNYUAN_VENV": str(tmp_path / "venv")},
    )  # fmt: skip
    assert "using the environment of" in done.stderr and "set up" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [str(tmp_path / "deploy" / "login_ssh.py"), "--ips", "a,b"]
    assert lines[3].startswith("--password-file=/proc/self/fd/")
    assert lines[-1] == f"{SECRET}600"
    assert done.stdout.count(SECRET) == 1
