"""Fingerprints, and which host keys are trusted."""

import pytest
from ssh_keys import keygen, public_key

from hunyuan_vllm.cluster.host_keys import Trust, parse_fingerprints, verify_host_key
from hunyuan_vllm.cluster.hosts import HostError, parse_hosts
from hunyuan_vllm.util.errors import UserError

HOSTS = parse_hosts("10.0.0.1,node2,fd00::3", 36000, "root")
NODE = HOSTS[0]
NONE: dict[str, frozenset[str]] = {}


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_fingerprints_are_those_of_openssh(tmp_path, kind):
    file = tmp_path / "key.pub"
    file.write_text(str(public_key(0, kind)))
    words = keygen("-l", "-f", file).split()
    assert (public_key(0, kind).fingerprint, f"({public_key(0, kind).kind})") == (words[1], words[-1])


def test_given_on_the_command_line_or_in_a_file(tmp_path):
    a, b = public_key(0).fingerprint, public_key(1).fingerprint
    file = tmp_path / "fingerprints"
    file.write_text(f"# of the fleet\n10.0.0.1 {a}\n10.0.0.1\t{b}\n\nFD00:0::3={b}\nelsewhere {a}\n")
    expected = {"10.0.0.1": {a, b}, "fd00::3": {b}}
    assert parse_fingerprints(str(file), HOSTS) == expected
    assert parse_fingerprints(f"10.0.0.1={a}, 10.0.0.1={b} [fd00::3]={b}", HOSTS) == expected
    assert parse_fingerprints(None, HOSTS) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node2=MD5:00:11", "is not HOST=SHA256:"),
        ("node2=SHA256:short", "is not HOST=SHA256:"),
        ("=SHA256:" + 43 * "A", "neither an IP address nor a host name"),
        ("node9=SHA256:" + 43 * "A", "names node9, which is not among the hosts"),
        ("/nonexistent/file", "cannot read the file /nonexistent/file: No such file"),
    ],
)
def test_what_is_no_fingerprint_is_named(text, words):
    with pytest.raises(UserError, match=words):
        parse_fingerprints(text, HOSTS)


def known(number: int, kind: str = "ed25519") -> str:
    return f"{NODE.known_hosts_name} {public_key(number, kind)}\n"


def vouched(number: int) -> dict[str, frozenset[str]]:
    return {NODE.name: frozenset({public_key(number).fingerprint})}


def test_why_a_key_is_trusted():
    key = public_key(0)
    assert verify_host_key(NODE, key, "", NONE) is None
    assert verify_host_key(NODE, key, f"other {public_key(1)}\n", NONE) is None
    assert verify_host_key(NODE, key, known(0), NONE) is Trust.KNOWN
    assert verify_host_key(NODE, key, "", vouched(0)) is Trust.GIVEN
    assert verify_host_key(NODE, key, known(1), vouched(0)) is Trust.GIVEN


@pytest.mark.parametrize(
    ("text", "fingerprints", "words"),
    [
        (known(1), NONE, "changed"),
        (known(1, "ecdsa"), NONE, "changed"),  # else a key of a kind not known yet would pass for a new host
        (known(0), vouched(1), "not the one of --fingerprints"),
        ("", vouched(1), "not the one of --fingerprints"),
        (known(0) + f"@revoked * {public_key(0)}\n", vouched(0), "revoked"),
    ],
    ids=["another known", "another kind known", "another vouched for", "only another vouched for", "revoked"],
)
def test_any_other_key_is_refused_with_its_fingerprint(text, fingerprints, words):
    with pytest.raises(HostError, match=words) as refused:
        verify_host_key(NODE, public_key(0), text, fingerprints)
    assert public_key(0).fingerprint in refused.value.text
    assert refused.value.remedy
