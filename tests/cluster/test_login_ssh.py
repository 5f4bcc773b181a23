"""deploy/login_ssh.py between three real hosts with real SSH servers."""

import pytest
from hosts import HOME
from operator_at_host import PASSWORD, PORT, log_in, options, ssh_state
from ssh_keys import public_key

pytestmark = pytest.mark.slow

FILE = ["--password-file", f"{HOME}/password"]


def test_every_pair(trio):
    a, b, c = trio.hosts
    done = log_in(a, trio.ips, *FILE, *options(*trio.servers))
    assert (done.status, done.report["ok"], done.report["changed"]) == (0, True, True)
    assert [(host["hostname"], host["trust"], host["key_made"]) for host in done.report["hosts"]] == [
        (name, "fingerprint given", True) for name in ("hosta", "hostb", "hostc")
    ]
    assert len(done.report["pairs"]) == 9 and done.failed() == set()
    for source in trio.hosts:
        for target in trio.hosts:
            said = source.sh(f"ssh -o BatchMode=yes -p {PORT} {target.address} hostname")
            assert said == f"{target.name}\n"
    for host in trio.hosts:
        assert host.sh(f"stat -c '%a %n' {HOME}/.ssh {HOME}/.ssh/*").splitlines() == [
            f"700 {HOME}/.ssh", f"600 {HOME}/.ssh/authorized_keys", f"600 {HOME}/.ssh/id_ed25519",
            f"600 {HOME}/.ssh/id_ed25519.pub", f"600 {HOME}/.ssh/known_hosts",
        ]  # fmt: skip
        names = [line.split()[0] for line in host.sh(f"cat {HOME}/.ssh/known_hosts").splitlines()]
        assert names == [f"[{other.address}]:{PORT}" for other in trio.hosts]
        keys = [line.split()[2] for line in host.sh(f"cat {HOME}/.ssh/authorized_keys").splitlines()]
        assert keys == ["root@hosta", "root@hostb", "root@hostc"]
    private = {host.sh(f"cat {HOME}/.ssh/id_ed25519") for host in (a, b, c)}
    assert len(private) == 3


def test_a_second_run_changes_nothing_and_needs_no_password(joined):
    a = joined.hosts[0]
    before = [ssh_state(host) for host in joined.hosts]
    assert all("known_hosts" in state for state in before)
    done = log_in(a, joined.ips)
    assert (done.status, done.report["changed"], done.failed()) == (0, False, set())
    assert {host["trust"] for host in done.report["hosts"]} == {"known before"}
    # Nor with all options.
    assert log_in(a, joined.ips, *FILE, *options(*joined.servers), "--yes").report["changed"] is False
    assert [ssh_state(host) for host in joined.hosts] == before


def test_what_is_there_is_kept(trio):
    a, b, c = trio.hosts
    mine = f'# mine\nfrom="10.0.0.0/8" {public_key(0)} me@desk'
    known = f"gitlab.example.org {public_key(1)}\n"
    for host in (a, b):
        host.run("tee", f"{HOME}/mine", input=mine)
        host.run("tee", f"{HOME}/known", input=known)
        host.sh(f"mkdir {HOME}/.ssh; cd {HOME}/.ssh; mv ../mine authorized_keys; mv ../known known_hosts; chmod 666 *")
        host.sh(f"ssh-keygen -q -H -f {HOME}/.ssh/known_hosts; rm {HOME}/.ssh/known_hosts.old")
    hashed = b.sh(f"cat {HOME}/.ssh/known_hosts")
    b.sh(
        f"cd {HOME}/.ssh; mkdir ../dotfiles; mv authorized_keys ../dotfiles/keys;"
        " ln -s ../dotfiles/keys authorized_keys"
    )
    b.sh(f"ssh-keygen -q -t ed25519 -N '' -C older -f {HOME}/.ssh/id_ed25519; rm {HOME}/.ssh/id_ed25519.pub")
    done = log_in(a, trio.ips, *FILE, *options(*trio.servers))
    assert done.status == 0, done
    assert done.host(b.address)["key_made"] is False
    text = b.sh(f"cat {HOME}/dotfiles/keys")
    assert text.startswith(mine + "\n") and len(text.splitlines()) == 2 + 3
    assert "older" in c.sh(f"cat {HOME}/.ssh/authorized_keys")
    assert b.sh(f"readlink {HOME}/.ssh/authorized_keys; stat -Lc %a {HOME}/.ssh/authorized_keys").split() == [
        "../dotfiles/keys", "600",
    ]  # fmt: skip
    text = b.sh(f"cat {HOME}/.ssh/known_hosts")
    assert text.startswith(hashed) and len(text.splitlines()) == 1 + 3


def test_a_changed_host_key_is_refused_until_it_is_vouched_for(joined):
    a, b, c = joined.hosts
    server = joined.servers[2]
    old = server.fingerprint
    server.stop()
    c.sh("mkdir /etc/ssh/old; cp /etc/ssh/ssh_host_* /etc/ssh/old")
    server.new_key()
    server.start()
    try:
        before = ssh_state(c)
        done = log_in(a, joined.ips, *FILE, "--yes")
        assert done.status == 1
        assert "its host key changed" in done.problems(c.address)
        assert old in done.problems(c.address) and server.fingerprint in done.problems(c.address)
        assert f"--fingerprints {c.address}=SHA256:" in done.problems(c.address)
        others = {a.address, b.address}
        assert not {pair for pair in done.failed() if set(pair) <= others}
        assert ssh_state(c) == before
        done = log_in(a, joined.ips, *options(server))
        assert done.status == 0, done
        for host in joined.hosts:
            found = host.sh(f"ssh-keygen -l -F '[{c.address}]:{PORT}'").splitlines()
            assert len(found) == 2 and server.fingerprint in found[1]
    finally:
        server.stop()
        c.sh("mv /etc/ssh/old/* /etc/ssh; rmdir /etc/ssh/old")
        server.start()


def test_a_wrong_fingerprint_is_refused_before_any_password(trio):
    a, b, c = trio.hosts
    logins = b.sh("grep -c 'Failed\\|Accepted' /var/log/sshd.log || true")
    wrong = f"{a.address}={trio.servers[0].fingerprint},{b.address}={public_key(0).fingerprint}"
    done = log_in(a, f"{a.address},{b.address}", *FILE, "--fingerprints", wrong)
    assert done.status == 1
    assert "not the one of --fingerprints" in done.problems(b.address)
    assert trio.servers[1].fingerprint in done.problems(b.address)
    assert b.sh("grep -c 'Failed\\|Accepted' /var/log/sshd.log || true") == logins
    assert ssh_state(b) == ""
    assert done.failed() == {(a.address, b.address), (b.address, a.address), (b.address, b.address)}


@pytest.mark.parametrize("more", [[], ["--yes"]], ids=["no terminal", "--yes"])
def test_unknown_host_keys_are_never_accepted_unseen(trio, more):
    a, b = trio.hosts[:2]
    done = log_in(a, b.address, *FILE, *more)
    assert done.status == 1
    assert "not known and was not confirmed" in done.problems(b.address)
    assert f"--fingerprints {b.address}={trio.servers[1].fingerprint}" in done.problems(b.address)
    assert ssh_state(b) == ""
    assert not a.sh(f"cat {HOME}/.ssh/known_hosts 2>/dev/null || true")


def test_a_host_that_pins_another_key_says_so_and_keeps_it(joined):
    a, b, c = joined.hosts
    name = f"[{c.address}]:{PORT}"
    other = f"{name} {public_key(0)}\n"
    b.sh(f"cd {HOME}/.ssh; grep -v -F '{name}' known_hosts >new; cat new - >known_hosts; rm new", input=other)
    before = ssh_state(b)
    done = log_in(a, joined.ips)
    assert done.status == 1
    assert f"it knows another host key for {c.address}" in done.problems(b.address)
    assert public_key(0).fingerprint in done.problems(b.address)
    assert done.failed() == {(b.address, c.address)}
    assert ssh_state(b) == before
    assert log_in(a, joined.ips, *options(joined.servers[2])).status == 0
    assert other not in b.sh(f"cat {HOME}/.ssh/known_hosts")


def test_names_ipv6_spaces_and_repetitions(trio):
    a, b, c = trio.hosts
    ips = f" {a.address}, HOSTB\thostb,[{c.address6.upper()}] {c.address6},"
    prints = f"hosta={trio.servers[0].fingerprint}"
    assert log_in(a, ips, *FILE, "--fingerprints", prints).status == 2
    prints = "\n".join(
        f"{name} {server.fingerprint}"
        for name, server in zip((a.address, "hostb", c.address6), trio.servers, strict=True)
    )
    a.run("tee", f"{HOME}/prints", input=f"# name and fingerprint\n{prints}\n")
    done = log_in(a, ips, *FILE, "--fingerprints", f"{HOME}/prints")
    assert done.status == 0, done
    assert [host["host"] for host in done.report["hosts"]] == [a.address, "hostb", c.address6]
    assert b.sh(f"ssh -o BatchMode=yes -p {PORT} {c.address6} hostname") == "hostc\n"
    assert [line.split()[0] for line in c.sh(f"cat {HOME}/.ssh/known_hosts").splitlines()] == [
        f"[{a.address}]:{PORT}", f"[hostb]:{PORT}", f"[{c.address6}]:{PORT}",
    ]  # fmt: skip


def test_one_machine_under_two_names(trio):
    a = trio.hosts[0]
    prints = ",".join(f"{name}={trio.servers[0].fingerprint}" for name in ("hosta", a.address))
    done = log_in(a, f"hosta,{a.address}", *FILE, "--fingerprints", prints)
    assert done.status == 0, done
    assert len(done.report["pairs"]) == 4
    assert len(a.sh(f"cat {HOME}/.ssh/authorized_keys").splitlines()) == 1
    assert len(a.sh(f"cat {HOME}/.ssh/known_hosts").splitlines()) == 2


def test_another_user_from_a_machine_that_is_no_host(trio):
    a, b, c = trio.hosts
    for server in trio.servers[1:]:
        server.add_user("serving", PASSWORD)
    done = log_in(a, f"{b.address},{c.address}", "--user", "serving", *options(*trio.servers[1:]),
                  HUNYUAN_SSH_PASSWORD=PASSWORD)  # fmt: skip
    assert done.status == 0, done
    assert [host["host"] for host in done.report["hosts"]] == ["this machine", b.address, c.address]
    assert len(done.report["pairs"]) == 6
    assert a.sh(f"ls {HOME}/.ssh").split() == ["id_ed25519", "id_ed25519.pub", "known_hosts"]
    assert ssh_state(b) == ""  # root's
    assert b.sh("stat -c '%U %a' /home/serving/.ssh /home/serving/.ssh/authorized_keys").split() == [
        "serving", "700", "serving", "600",
    ]  # fmt: skip


def test_an_identity_is_enough_for_the_first_login(trio):
    a, b = trio.hosts[:2]
    a.sh(f"ssh-keygen -q -t ecdsa -N '' -f {HOME}/cloud")
    b.sh(f"mkdir -m 700 {HOME}/.ssh; cat >{HOME}/.ssh/authorized_keys", input=a.sh(f"cat {HOME}/cloud.pub"))
    done = log_in(a, b.address, "--identity", f"{HOME}/cloud", *options(trio.servers[1]))
    assert done.status == 0, done
    assert a.sh(f"ssh -o BatchMode=yes -p {PORT} {b.address} hostname") == "hostb\n"


def test_noise_of_start_up_files_does_no_harm(trio):
    a, b = trio.hosts[:2]
    b.sh(f"cat >{HOME}/.bashrc", input="echo Welcome; echo to the machine >&2; printf 'no newline'\n")
    try:
        done = log_in(a, f"{a.address},{b.address}", *FILE, *options(*trio.servers[:2]))
    finally:
        b.sh(f"rm {HOME}/.bashrc")
    assert done.status == 0, done
