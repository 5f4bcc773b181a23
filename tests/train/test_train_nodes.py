"""A run over several nodes: what the variables mean, what must be alike, and two real hosts with SSH between them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import HOME, Host, Network, Sshd, need_hosts

from hunyuan_vllm.train.launch import Launch, main
from hunyuan_vllm.train.nodes import NodeOfRun, compare, facts, read_nodes
from hunyuan_vllm.util.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PORT = 36000
PAIR = {"NODE_IP_LIST": "10.0.0.1:8,10.0.0.2:8", "LOCAL_IP": "10.0.0.1"}


def nodes(**environ: str) -> list[NodeOfRun]:
    return read_nodes(environ, lambda: 4, {"10.0.0.2"})[0]


class TestVariables:
    def test_one_node_has_a_process_for_each_gpu(self) -> None:
        assert nodes() == [NodeOfRun("127.0.0.1", 4)]
        assert nodes(HOST_GPU_NUM="2", NODES="1", NODE_NUM="2") == [NodeOfRun("127.0.0.1", 2)]
        assert read_nodes({}, lambda: 0)[0] == [NodeOfRun("127.0.0.1", 1)]

    def test_this_node_is_the_first(self) -> None:
        two = [NodeOfRun("10.0.0.1", 8), NodeOfRun("10.0.0.2", 8)]
        assert nodes(**PAIR, HOST_GPU_NUM="8", NODES="2", NODE_NUM="16") == two
        assert nodes(**PAIR | {"LOCAL_IP": "10.0.0.2"}) == two[::-1]
        assert nodes(NODE_IP_LIST=PAIR["NODE_IP_LIST"]) == two[::-1]  # which it is, by its own addresses
        assert read_nodes({**PAIR, "MASTER_PORT": "4000"}, lambda: 0)[1] == 4000

    @pytest.mark.parametrize(
        ("environ", "words"),
        [
            ({"HOST_GPU_NUM": "many"}, "HOST_GPU_NUM=many is not a number"),
            ({"NODE_IP_LIST": "10.0.0.1"}, "10.0.0.1 is not ADDRESS:GPUS"),
            ({"NODE_IP_LIST": "10.0.0.1:8,10.0.0.1:8"}, "names a node twice"),
            ({**PAIR, "HOST_GPU_NUM": "4"}, "HOST_GPU_NUM=4, and NODE_IP_LIST says 10.0.0.1:8"),
            ({**PAIR, "NODES": "3"}, "NODES=3, and NODE_IP_LIST has 2"),
            ({**PAIR, "NODE_NUM": "8"}, "NODE_NUM=8, and NODE_IP_LIST has 16"),
            ({**PAIR, "LOCAL_IP": "10.0.0.3"}, "LOCAL_IP=10.0.0.3 is not in NODE_IP_LIST"),
            ({"NODE_IP_LIST": "10.0.0.8:1,10.0.0.9:1"}, "set LOCAL_IP"),
        ],
    )
    def test_what_does_not_fit_is_named(self, environ: dict[str, str], words: str) -> None:
        with pytest.raises(UserError, match=words):
            nodes(**environ)

    def test_a_dry_run_shows_each_nodes_command(self, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        for name, value in {**PAIR, "SOCKET_IFNAME": "bond1", "SSH_PORT": "36000", "HF_TOKEN": "secret"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)  # conftest.py sets it
        assert main(["--dry-run", "--output_dir", "out"]) == 0
        shown = capsys.readouterr().out
        first, second = shown.split("10.0.0.2 (over ssh ")
        assert "--node-rank=0" in first and "--node-rank=1" in second and "-p 36000 10.0.0.2)" in second
        for part in (first, second):
            assert "--nnodes=2" in part and "--nproc-per-node=8" in part and "--master-addr=10.0.0.1" in part
            assert "GLOO_SOCKET_IFNAME=bond1" in part and part.rstrip().endswith(
                "-m hunyuan_vllm.train --output_dir out"
            )
        assert "BatchMode=yes" in second and "StrictHostKeyChecking=yes" in second
        assert "secret" not in shown


class TestAlike:
    def test_what_differs_is_named_with_who_has_it(self, tmp_path: Path) -> None:
        data, weights = tmp_path / "data.jsonl", tmp_path / "model"
        weights.mkdir()
        data.write_text("one\n")
        (weights / "model.safetensors").write_bytes(b"1" * (3 << 20))
        known = facts([str(data), str(weights)])
        compare({"a": known, "b": dict(known)})
        assert {"Python", "torch", "hunyuan_vllm/train/nodes.py", str(data)} <= known.keys()
        data.write_text("two\n")
        (weights / "model.safetensors").write_bytes(b"1" * (3 << 20) + b"2")
        changed = facts([str(data), str(weights)])
        with pytest.raises(
            UserError, match=r"data\.jsonl is 4 bytes \w+ on a; 4 bytes \w+ on b \(also .*safetensors\)"
        ):
            compare({"a": known, "b": changed})


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Host, Host]]:
    """Two hosts; the first may log in to the second by key, and knows its host key."""
    need_hosts()
    with Network() as network:
        one, two = network.add("one"), network.add("two")
        server = Sshd(two, PORT, "password")
        one.sh("mkdir -m 700 -p ~/.ssh; ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519")
        two.sh("mkdir -m 700 -p ~/.ssh; cat >~/.ssh/authorized_keys", input=one.sh("cat ~/.ssh/id_ed25519.pub"))
        key = two.sh("cat /etc/ssh/ssh_host_ed25519_key.pub").split()[:2]
        one.sh("cat >~/.ssh/known_hosts", input=f"[{two.address}]:{server.port} {' '.join(key)}\n")
        for host in (one, two):
            host.sh(f"head -n 64 {ROOT}/train/data/train.jsonl >~/data.jsonl")
        yield one, two


LATE = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(4)\n"


def launch(pair: tuple[Host, Host], *more: str, **variables: str):
    """What an operator types on the first."""
    one, two = pair
    environ = one.environment(
        NODE_IP_LIST=f"{one.address}:1,{two.address}:1", LOCAL_IP=one.address, NODES="2", NODE_NUM="2",
        HOST_GPU_NUM="1", SSH_PORT=str(PORT), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **variables,
    )  # fmt: skip
    words = ["--train_data_file", f"{HOME}/data.jsonl", "--output_dir", f"{HOME}/out", "--max_steps", "3",
             "--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_strategy", "no", *more]  # fmt: skip
    return one.run(sys.executable, "-m", "hunyuan_vllm.train.launch", *words, check=False, env=environ, timeout=240)


class TestTwoHosts:
    def test_they_train_together(self, pair: tuple[Host, Host]) -> None:
        done = launch(pair)
        assert done.returncode == 0, done.stderr
        assert "comparing 2 nodes" in done.stderr and "are trained, 8 rows per step" in done.stderr
        assert done.stderr.count("step 3/3") == 1  # the first process speaks for all
        one, two = pair
        assert "adapter_model.safetensors" in one.sh("ls ~/out/final")
        left = two.sh("ps -eo args= | grep -c [h]unyuan_vllm.train || true")
        assert left.strip() == "0"

    def test_a_mistake_is_one_line_also_where_another_process_meets_it_first(self, pair: tuple[Host, Host]) -> None:
        pair[0].sh("mkdir ~/late; cat >~/late/sitecustomize.py", input=LATE)
        done = launch(pair, "--deepspeed", "/nowhere.json", PYTHONPATH=f"{HOME}/late")
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith("hunyuan-vllm: --deepspeed /nowhere.json cannot be read")

    def test_other_data_on_one_host(self, pair: tuple[Host, Host]) -> None:
        pair[1].sh("echo >>~/data.jsonl")
        done = launch(pair)
        assert done.returncode == 2 and f"the nodes differ: {HOME}/data.jsonl is" in done.stderr, done.stderr

    def test_a_host_whose_key_is_not_known(self, pair: tuple[Host, Host]) -> None:
        pair[0].sh("rm ~/.ssh/known_hosts")
        done = launch(pair)
        assert done.returncode == 2 and "Host key verification failed" in done.stderr, done.stderr


@pytest.mark.parametrize("spelling", ["--train_data_file", "--train-data-file"])
def test_nodes_with_other_data_are_told_apart_by_either_spelling(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins for the nodes: each answers with the paths that it was asked about."""
    file = tmp_path / "data.jsonl"
    file.touch()
    program = "import json, sys; print(json.dumps({path: sys.argv[1] for path in json.load(sys.stdin)['paths']}))"
    monkeypatch.setattr(Launch, "_command", lambda self, rank: [sys.executable, "-c", program, str(rank)])
    run = Launch([NodeOfRun("10.0.0.1", 1), NodeOfRun("10.0.0.2", 1)], 29500, [spelling, str(file)], {})
    with pytest.raises(UserError, match=r"the nodes differ: .*data\.jsonl is 0 on 10\.0\.0\.1; 1 on 10\.0\.0\.2"):
        run.check()


def test_a_node_that_ends_at_once_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its standard input may be closed before it is told what to do."""
    program = "import os, sys; os.close(0); sys.exit(3)"
    monkeypatch.setattr(Launch, "_command", lambda self, rank: [sys.executable, "-c", program])
    flags = ["--x", "y" * 1_000_000]  # more than a pipe takes
    assert Launch([NodeOfRun("10.0.0.1", 2)], 29500, flags, {}).run() == 3


def test_each_node_is_told_its_own_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Launch([NodeOfRun("10.0.0.1", 8), NodeOfRun("10.0.0.2", 4)], 29500, ["--bf16"], {"OMP_NUM_THREADS": "4"})
    orders = [run.order(rank) for rank in range(2)]
    assert [(order["rank"], order["processes"], order["address"]) for order in orders] == [
        (0, 8, "10.0.0.1"), (1, 4, "10.0.0.2"),
    ]  # fmt: skip
    assert all(
        order["master"] == ["10.0.0.1", 29500] and order["variables"] == {"OMP_NUM_THREADS": "4"} for order in orders
    )
