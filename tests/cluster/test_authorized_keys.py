"""The text of authorized_keys."""

import pytest
from ssh_keys import public_key

from hunyuan_vllm.cluster.host_keys import authorize


def line(number: int) -> str:
    return f"{public_key(number)} root@node{number}"


def test_each_key_once_in_order():
    assert authorize("", [line(0), line(1), line(0)]) == f"{line(0)}\n{line(1)}\n"


@pytest.mark.parametrize(
    "there",
    [line(0) + "\n", f"{public_key(0)}\n", f'from="10.0.0.0/8",command="echo a b" {line(0)}\r\n', f"  {line(0)} x y\n"],
    ids=["as it is", "without comment", "with options", "with spaces"],
)
def test_a_key_that_is_there_stays_as_it_is(there):
    assert authorize(there, [line(0)]) == there


@pytest.mark.parametrize(
    "there",
    ["# mine\n\n", "# no newline", f"# {line(0)}\n", f"{line(1)}"],
    ids=["comment", "no newline", "commented out", "another key"],
)
def test_every_byte_is_kept(there):
    end = "" if there.endswith("\n") else "\n"
    assert authorize(there, [line(0)]) == f"{there}{end}{line(0)}\n"


def test_what_is_no_key_does_not_get_in():
    with pytest.raises(ValueError, match="not a public key"):
        authorize("", ["command=reboot"])
