"""Private files and the token: made once, never open to others, whole or as they were."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from hunyuan_vllm.cluster.ray_node import make_token, read_token, token_file
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import make_private, read_private, write_private


@pytest.fixture(autouse=True)
def open_umask():
    old = os.umask(0)
    yield
    os.umask(old)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_written_once_and_closed(tmp_path):
    file = tmp_path / "new" / "file"
    assert write_private(file, "one")
    assert (mode(file), mode(file.parent), file.read_text()) == (0o600, 0o700, "one")
    before = file.stat().st_ino
    assert not write_private(file, "one") and file.stat().st_ino == before
    assert write_private(file, "two") and file.read_text() == "two"
    file.chmod(0o644)
    assert write_private(file, "two") and mode(file) == 0o600
    assert os.listdir(file.parent) == ["file"]


def test_of_two_who_make_it_one_does(tmp_path):
    file = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda text: make_private(file, str(text)), [1]))
    assert made == [True] and not make_private(file, "other") and file.read_text() == "1"
    assert mode(file) == 0o600


def test_what_others_can_read_is_refused(tmp_path):
    file = tmp_path / "file"
    assert read_private(file) is None
    file.write_text("x")
    file.chmod(0o640)
    with pytest.raises(UserError, match=f"open to other users: chmod 600 {file}"):
        read_private(file)
    file.chmod(0o400)
    assert read_private(file) == "x"


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: "):
        write_private(tmp_path / "file" / "below", "x")


def test_a_token_is_made_once(tmp_path):
    file = token_file({}, tmp_path)
    assert file == tmp_path / ".ray" / "auth_token" and read_token(file) is None
    token = make_token(file)
    assert len(token) == 64 and make_token(file) == token == read_token(file)
    assert (mode(file), mode(file.parent)) == (0o600, 0o700)
    assert not write_private(file, token)
    assert write_private(file, "f" * 64) and read_token(file) == "f" * 64
    assert token_file({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "own")}, tmp_path) == tmp_path / "own"


@pytest.mark.parametrize("text", ["", "  \n", "two words", "ü"])
def test_what_is_no_token(tmp_path, text):
    write_private(tmp_path / "token", text)
    with pytest.raises(UserError, match="holds no token"):
        read_token(tmp_path / "token")
