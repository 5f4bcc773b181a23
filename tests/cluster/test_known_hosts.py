"""The text of known_hosts, against what ssh-keygen finds in it."""

import pytest
from ssh_keys import keygen, public_key

from hunyuan_vllm.cluster.host_keys import keys_of, pin

NAMES = ["[10.0.0.1]:36000", "10.0.0.1", "[fd00::1]:36000", "fd00::1", "node1.example.org", "[node1]:2222"]


def openssh_finds(file, name) -> list[str]:
    lines = keygen("-F", name, "-f", file, check=False).splitlines()
    return [" ".join(line.split()[1:3]) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("hashed", [False, True], ids=["plain", "hashed"])
def test_finds_what_openssh_finds(tmp_path, hashed):
    file = tmp_path / "known_hosts"
    file.write_text("# a comment\n\n" + "".join(f"{name} {public_key(i % 3)} note\n" for i, name in enumerate(NAMES)))
    if hashed:
        keygen("-H", "-f", file)
        assert NAMES[0] not in file.read_text()
    for name in [*NAMES, "10.0.0.2", "[10.0.0.1]:22", "fd00::2", "node1"]:
        assert [str(key) for key in keys_of(file.read_text(), name)] == openssh_finds(file, name)


@pytest.mark.parametrize("field", ["node1,10.0.0.1", "*.example.org", "node?", "!node1,node*", "NODE1", "[node*]:2222"])
def test_patterns_mean_what_they_mean_to_openssh(tmp_path, field):
    file = tmp_path / "known_hosts"
    file.write_text(f"{field} {public_key(0)}\n")
    for name in ["node1", "node2", "node10", "10.0.0.1", "a.example.org", "example.org", "[node1]:2222"]:
        assert [str(key) for key in keys_of(file.read_text(), name)] == openssh_finds(file, name), name


def test_what_openssh_reads_back_is_what_was_pinned(tmp_path):
    file = tmp_path / "known_hosts"
    keys = {name: public_key(i) for i, name in enumerate(NAMES[:4])}
    file.write_text(pin("", keys))
    for name, key in keys.items():
        assert openssh_finds(file, name) == [str(key)]
    assert len(file.read_text().splitlines()) == 4


def test_pinning_again_changes_nothing_and_keeps_every_byte():
    text = f"# mine\n\nold.example.org {public_key(3)}\r\n@cert-authority * {public_key(4)}\nno newline \udcff"
    once = pin(text, {"node1": public_key(0)})
    assert once == f"{text}\nnode1 {public_key(0)}\n"
    assert pin(once, {"node1": public_key(0)}) == once


def test_a_key_of_another_kind_is_added_beside():
    text = f"node1 {public_key(0, 'ecdsa')}\n"
    assert pin(text, {"node1": public_key(0)}) == text + f"node1 {public_key(0)}\n"


def test_only_the_replaced_name_loses_its_old_keys():
    others = f"node2 {public_key(1)}\nnode3 {public_key(1)}\n"
    text = f"# top\nnode1 {public_key(1)}\nnode1 {public_key(2, 'ecdsa')}\n{others}"
    keys = {"node1": public_key(0), "node2": public_key(0)}
    assert pin(text, keys, replace=["node1"]) == (f"# top\n{others}node1 {public_key(0)}\nnode2 {public_key(0)}\n")


def test_a_line_for_many_hosts_is_not_removed_for_one():
    text = f"node* {public_key(1)}\n"
    assert pin(text, {"node1": public_key(0)}, replace=["node1"]) == f"{text}node1 {public_key(0)}\n"


def test_markers():
    text = f"@revoked * {public_key(0)}\n@cert-authority * {public_key(1)}\n"
    assert keys_of(text, "node1") == []
    assert keys_of(text, "node1", "@revoked") == [public_key(0)]


@pytest.mark.parametrize("line", ["", "node1", "node1 ssh-rsa", "node1 ssh-rsa ???", "|1|x", "|1|x|y| ssh-rsa AA"])
def test_damaged_lines_are_passed_over(line):
    assert keys_of(line, "node1") == []
