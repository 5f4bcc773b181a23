"""What is wrong with a host is named with its remedy; the others are completed; nothing is left half-written."""

import signal
import subprocess
import sys

import psutil
import pytest
from hosts import HOME, Network, Sshd, need_hosts
from operator_at_host import PASSWORD, PORT, command, log_in, options, ssh_state
from ssh_keys import public_key

pytestmark = pytest.mark.slow

FILE = ["--password-file", f"{HOME}/password"]
MUTE = f"import socket; s = socket.create_server(('', {PORT})); print(flush=True); c = [s.accept() for _ in range(99)]"

# host → how it is made ill, what is said of it, what is said to do
ILLS = {
    "wrongpass": ("", "root@wrongpass refuses the password", "check password and --user"),
    "nopass": ("", "accepts no password and none of the available keys", "give a key that it accepts with --identity"),
    "changed": ("", "its host key changed", "compare at its console"),
    "refused": ("", f"nothing listens on refused port {PORT}", "start sshd there"),
    "mute": ("", "sends nothing within 2 s", "--timeout waits longer"),
    "gone": ("", "gone port 36000 is unreachable|no answer from gone port 36000", "that the host is up"),
    "full": (
        f"mount -t tmpfs -o size=32k,mode=700 full {HOME}; mkdir -m 700 {HOME}/.ssh; cd {HOME}/.ssh;"
        f"echo '# mine' >authorized_keys; chmod 600 authorized_keys; cat /dev/zero >{HOME}/fill || true",
        "No space left on device", "free space",
    ),
    "readonly": (f"mount -o remount,ro {HOME}", "Read-only file system", f"solve that in {HOME}/.ssh"),
    "clientless": ("rm /usr/bin/ssh", "it has no SSH client to log in to others with", "install openssh-client there"),
    "badhome": (f"chmod 777 {HOME}", f"{HOME} is writable by others (mode 777)", f"chmod go-w {HOME}"),
    "passphrase": (
        f"mkdir -m 700 {HOME}/.ssh; ssh-keygen -q -t ed25519 -N secret -f {HOME}/.ssh/id_ed25519",
        "incorrect passphrase supplied", "a key without a passphrase",
    ),
    "nologin": ("usermod -s /usr/sbin/nologin root", "the account runs no commands: This account", "POSIX login shell"),
}  # fmt: skip
# They can still be logged in to, or log in to others.
REACHED = {"clientless", "passphrase"}
REACHES = {"badhome"}


@pytest.fixture(scope="module")
def ward():
    """Two hosts that are well, and one of each ill; the operator is at the first."""
    need_hosts()
    with Network() as network:
        hosts = {name: network.add(name) for name in ("head", "well", *ILLS)}
        servers = {}
        for name, host in hosts.items():
            if name not in ("refused", "mute"):
                password = "another" if name == "wrongpass" else PASSWORD
                more = "PasswordAuthentication no" if name == "nopass" else ""
                servers[name] = Sshd(host, PORT, password, more)
            if name in ILLS and ILLS[name][0]:
                host.sh(ILLS[name][0])
        head = hosts["head"]
        head.sh(f"umask 077; cat >{HOME}/password", input=PASSWORD + "\n")
        pinned = f"[changed]:{PORT} {public_key(0)}\n"
        head.sh(f"umask 077; mkdir {HOME}/.ssh; cat >{HOME}/.ssh/known_hosts", input=pinned)
        prints = "".join(f"{name} {server.fingerprint}\n" for name, server in servers.items() if name != "changed")
        head.run("tee", f"{HOME}/prints", input=prints)
        hosts["gone"].unplug()
        mute = hosts["mute"].start(sys.executable, "-c", MUTE, stdout=subprocess.PIPE)
        mute.stdout.readline()
        yield hosts
        mute.kill()
        mute.communicate()


def arguments() -> list[str]:
    return [*FILE, "--fingerprints", f"{HOME}/prints", "--timeout", "2", "--jobs", "16"]


def test_each_is_named_and_the_rest_is_completed(ward):
    before = {name: ssh_state(host) for name, host in ward.items()}
    done = log_in(ward["head"], ",".join(ward) + ",unheard-of", *arguments())
    assert done.status == 1 and done.report["ok"] is False
    for name, (_, what, remedy) in ILLS.items():
        said = done.problems(name)
        assert any(part in said for part in what.split("|")), (name, said)
        assert any(part in said for part in remedy.split("|")), (name, said)
    assert "the name unheard-of is not known here: give its IP address" in done.problems("unheard-of")
    assert done.problems("head") == done.problems("well") == ""
    assert len(done.host("full")["problems"]) == len(done.host("readonly")["problems"]) == 1

    well = {"head", "well"}
    verified = {(pair["from"], pair["to"]) for pair in done.report["pairs"] if pair["ok"]}
    assert verified == {(source, target) for source in well | REACHES for target in well | REACHED}
    for name in ("readonly", "wrongpass", "nopass", "changed", "nologin"):
        assert ssh_state(ward[name]) == before[name], name
    # Here a try came and went in the directory.
    assert ssh_state(ward["full"]).splitlines()[1:] == before["full"].splitlines()[1:] != []
    for host in ward.values():
        kept = {"id_ed25519", "id_ed25519.pub", "authorized_keys", "known_hosts"}
        assert set(host.sh(f"ls -A {HOME}/.ssh 2>/dev/null || true").split()) <= kept


def test_the_table_names_each_with_its_remedy(ward):
    ill = ("wrongpass", "refused", "full", "badhome")
    ips = ",".join(("head", *ill))
    done = ward["head"].run(*command(ips, *arguments()), check=False, env=ward["head"].environment(COLUMNS="80"))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    for name in ill:
        line = next(number for number, text in enumerate(lines) if text.startswith(f"{name}: "))
        assert ILLS[name][1] in lines[line]
        assert ILLS[name][2] in lines[line + 1] and lines[line + 1].startswith("    ")
    assert lines[-1].startswith("2 of 25 logins verified")
    # What follows from an ill host is not told again pair by pair.
    assert "→" not in done.stdout


def test_a_disk_that_fills_up_leaves_each_file_old_or_new(trio):
    """As it is after the key is made: only the small files are to be written, and there is no room for them."""
    a, b = trio.hosts[:2]
    b.sh(f"mount -t tmpfs -o size=64k,mode=700 small {HOME}; mkdir -m 700 {HOME}/.ssh")
    try:
        b.sh(f"cd {HOME}/.ssh; ssh-keygen -q -t ed25519 -N '' -f id_ed25519; echo '# mine' >authorized_keys")
        b.sh(f"cd {HOME}/.ssh; cp authorized_keys known_hosts; chmod 600 *; cat /dev/zero >{HOME}/fill || true")
        before = b.sh(f"cat {HOME}/.ssh/authorized_keys {HOME}/.ssh/known_hosts; ls -A {HOME}/.ssh")
        done = log_in(a, f"{a.address},{b.address}", *FILE, *options(*trio.servers[:2]))
        assert "No space left on device" in done.problems(b.address)
        assert b.sh(f"cat {HOME}/.ssh/authorized_keys {HOME}/.ssh/known_hosts; ls -A {HOME}/.ssh") == before
        b.sh(f"rm {HOME}/fill")
        assert log_in(a, f"{a.address},{b.address}", *FILE).status == 0
        assert b.sh(f"head -1 {HOME}/.ssh/authorized_keys; head -1 {HOME}/.ssh/known_hosts") == "# mine\n# mine\n"
    finally:
        b.sh(f"umount {HOME}")


def test_logins_between_hosts_that_fail_are_told_with_their_reason(trio):
    """The hosts are well and reached from here, but one does not let the other in."""
    a, b, c = trio.hosts
    server = trio.servers[2]
    log = c.sh("cat /etc/ssh/sshd_config")
    c.sh("cat >>/etc/ssh/sshd_config", input=f"DenyUsers root@{b.address}\n")
    server.stop()
    server.start()
    try:
        done = a.run(*command(trio.ips, *FILE, *options(*trio.servers)), check=False)
    finally:
        c.run("tee", "/etc/ssh/sshd_config", input=log)
        server.stop()
        server.start()
    assert done.returncode == 1
    assert f"{b.address} → {c.address}: ssh to {c.address} failed: root@{c.address}: Permission denied" in done.stdout
    assert f"\n    run there: ssh -v -p {PORT} root@{c.address}; " in done.stdout
    assert "8 of 9 logins verified" in done.stdout


def test_files_of_another_user_are_named(trio):
    a, b = trio.hosts[:2]
    trio.servers[1].add_user("serving", PASSWORD)
    b.sh("rm -rf /home/serving/.ssh; mkdir -m 700 /home/serving/.ssh")
    done = log_in(a, b.address, "--user", "serving", *FILE, *options(trio.servers[1]))
    assert done.status == 1
    assert "Permission denied" in done.problems(b.address) and "/home/serving/.ssh" in done.problems(b.address)
    assert b.sh("ls -A /home/serving/.ssh") == ""
    b.sh("rmdir /home/serving/.ssh")


def test_an_interrupted_run_says_so_and_leaves_no_one_waiting(ward):
    running = ward["head"].start(
        *command("mute", *arguments(), "--timeout", "300"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ward["head"].sh("while ! ss -tn | grep -q ESTAB.*:36000; do sleep 0.05; done", timeout=30)
    (inside,) = psutil.Process(running.pid).children()  # nsenter hands no signal on
    inside.send_signal(signal.SIGINT)
    out, errors = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert (
        errors.splitlines()[-1] == "login_ssh: interrupted: every file is complete, old or new; run it again to finish"
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--ips", "10.0.0.300"], "10.0.0.300 is neither an IP address nor a host name"),
        (["--password-file", "/nonexistent"], "the password file /nonexistent cannot be read"),
        (["--password-file", f"{HOME}/password", "--password", "x"], "give either --password or --password-file"),
        (["--password="], "--password is empty"),
        (["--fingerprints", "well=SHA256:abc"], "is not HOST=SHA256:"),
        (["--port", "0"], "greater than or equal to 1"),
    ],
)
def test_a_mistake_in_the_options_is_one_line_before_anything_is_done(ward, more, words):
    before = ssh_state(ward["head"])
    done = ward["head"].run(*command("well", *more), check=False)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr
    assert ssh_state(ward["head"]) == before
