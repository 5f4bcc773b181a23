"""Where the password and the keys come from, and what is wrong with them."""

import pytest
from ssh_keys import make_key

from hunyuan_vllm.cluster.credentials import default_keys, read_identity, read_password_file
from hunyuan_vllm.cluster.ssh import Credentials
from hunyuan_vllm.envs import take_ssh_password
from hunyuan_vllm.util.errors import UserError


def test_a_password_file_must_be_private_and_say_something(tmp_path):
    file = tmp_path / "password"
    file.write_text(' it\'s "odd" \r\nsecond line\n')
    file.chmod(0o640)
    with pytest.raises(UserError, match=f"open to other users: chmod 600 {file}"):
        read_password_file(file)
    file.chmod(0o600)
    assert read_password_file(file) == ' it\'s "odd" '
    file.write_text("\n")
    with pytest.raises(UserError, match="must hold the password"):
        read_password_file(file)
    with pytest.raises(UserError, match="No such file"):
        read_password_file(tmp_path / "absent")


def test_the_environment_variable_is_not_inherited(monkeypatch):
    monkeypatch.setenv("HUNYUAN_SSH_PASSWORD", "secret")
    assert take_ssh_password() == "secret"
    assert take_ssh_password() is None


def test_a_password_is_not_printed():
    assert "secret" not in repr(Credentials(password="secret"))


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_identities(tmp_path, kind):
    public = make_key(tmp_path / "plain", kind)
    assert read_identity(tmp_path / "plain").get_base64() == public.split()[1]
    make_key(tmp_path / "locked", kind, "geheim")
    with pytest.raises(UserError, match="has a passphrase"):
        read_identity(tmp_path / "locked")


def test_what_is_no_identity_is_named(tmp_path):
    make_key(tmp_path / "key")
    with pytest.raises(UserError, match="is the public half"):
        read_identity(tmp_path / "key.pub")
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(UserError, match="open to other users"):
        read_identity(tmp_path / "key")
    (tmp_path / "text").touch(0o600)
    with pytest.raises(UserError, match="not a private key"):
        read_identity(tmp_path / "text")
    with pytest.raises(UserError, match="No such file"):
        read_identity(tmp_path / "absent")


def test_default_keys_are_those_that_need_no_one(tmp_path):
    (tmp_path / ".ssh").mkdir()
    assert default_keys(tmp_path) == []
    make_key(tmp_path / ".ssh" / "id_ed25519", passphrase="geheim")
    public = make_key(tmp_path / ".ssh" / "id_ecdsa", "ecdsa")
    assert [key.get_base64() for key in default_keys(tmp_path)] == [public.split()[1]]
