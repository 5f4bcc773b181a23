"""The hosts an operator names."""

import pytest

from hunyuan_vllm.cluster.hosts import Host, parse_hosts
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.net import normalise_address


def addresses(text: str) -> list[str]:
    return [host.name for host in parse_hosts(text, 36000, "root")]


def test_any_separator_and_each_host_once():
    assert addresses("10.0.0.1,10.0.0.2") == ["10.0.0.1", "10.0.0.2"]
    assert addresses("  10.0.0.1 ,, 10.0.0.2\n10.0.0.1,\t") == ["10.0.0.1", "10.0.0.2"]
    assert addresses("Node1.Example.org node1.example.org [FD00:0:0::1] fd00::1") == ["node1.example.org", "fd00::1"]


@pytest.mark.parametrize(
    ("port", "address", "name"),
    [(22, "10.0.0.1", "10.0.0.1"), (22, "fd00::1", "fd00::1"), (2222, "fd00::1", "[fd00::1]:2222"),
     (36000, "node1", "[node1]:36000")],
)  # fmt: skip
def test_the_name_in_known_hosts(port, address, name):
    assert Host(address, port, "root").known_hosts_name == name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no host"),
        (" , ", "names no host"),
        ("10.0.0.256", "neither an IP address nor a host name"),
        ("10.0.0", "neither an IP address nor a host name"),
        ("-oProxyCommand=x", "neither an IP address nor a host name"),
        ("node1;reboot", "neither an IP address nor a host name"),
        ("root@10.0.0.1", "--user"),
        ("10.0.0.1:22", "the port with its own option"),
        ("[fd00::1]:22", "the port with its own option"),
        ("fe80::1%eth0", "one link only"),
        ("0.0.0.0", "not the address of a host"),
        ("127.0.0.1,10.0.0.2", "a different machine on every host"),
        ("localhost,10.0.0.2", "a different machine on every host"),
    ],
)
def test_what_is_no_host_is_named(text, words):
    with pytest.raises(UserError, match=words):
        addresses(text)


@pytest.mark.parametrize("user", ["", "-l", "a b", "a@b", "$(id)"])
def test_what_is_no_user_is_named(user):
    with pytest.raises(UserError, match="not a user name"):
        parse_hosts("10.0.0.1", 22, user)


def test_an_address_has_one_spelling():
    assert normalise_address("FD00:0:0:0::a") == normalise_address("[fd00::A]") == "fd00::a"
