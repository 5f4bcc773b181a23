"""`hunyuan-vllm cluster up`, `status`, `down` with real Ray on real hosts, one after the other on the same cluster."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import HOME
from operator_at_host import PASSWORD, PORT, cluster, log_in, options
from ray_hosts.faults import kill
from waiting import eventually

from hunyuan_vllm.cluster.ray_node import PORTS, RAY_SETTINGS

pytestmark = pytest.mark.slow

GIVEN_UP = 30.0  # seconds after which the head has surely given up a node that is silent
UP = ["--ssh-port", str(PORT), "--gpus-per-node", "1", "--logical-gpus", "--json"]
TOKEN = f"{HOME}/.ray/auth_token"
DEPLOY = Path(__file__).parents[2] / "deploy"
REACH = f"import socket, sys; socket.create_connection((sys.argv[1], {PORT}), 3).close()"
# A program that uses the cluster: an actor on each GPU, and a process of its own that an actor leaves behind.
DRIVER = """
import ray, subprocess, sys, time
ray.init(address="auto", log_to_driver=False)

@ray.remote(num_gpus=1)
class Worker:
    def where(self):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        return ray.util.get_node_ip_address()

workers = [Worker.remote() for _ in range(2)]
print(*sorted(ray.get([worker.where.remote() for worker in workers], timeout=60)), flush=True)
time.sleep(600)
"""
# A notebook whose user thinks: joined, and nothing runs.
IDLE_DRIVER = "import ray, time; ray.init(address='auto'); print('joined', flush=True); time.sleep(600)"
# Whether the head's GCS answers someone without the token, or with another one.
STRANGER = """
import sys
from ray._raylet import GcsClient
try:
    print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)))
except Exception as error:
    print(type(error).__name__, str(error).replace(chr(10), " "))
"""


@pytest.fixture(scope="module")
def hosts(trio_of_module):
    """Hosts a and b, which log in to each other, and c, a stranger on the same network."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: sh deploy/setup_env.sh --test")
    a, b, c = trio_of_module.hosts
    for host in (a, b):
        host.sh("umask 077; rm -rf ~/.ssh; cat >~/password", input=PASSWORD)
    done = log_in(a, f"{a.address},{b.address}", "--password-file", f"{HOME}/password",
                  *options(*trio_of_module.servers[:2]))  # fmt: skip
    assert done.status == 0, done
    return a, b, c


def up(a, b, *more: str) -> tuple[int, dict]:
    done = cluster(a, "up", "--hosts", f"{a.address},{b.address}", *UP, *more)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def status(a, *more: str) -> tuple[int, dict]:
    done = cluster(a, "status", "--json", *more)
    return done.returncode, json.loads(done.stdout)


def script_command(role: str) -> list[str]:
    """The command of the script for that role ("stop" too), as the script has it."""
    last = (DEPLOY / f"ray_{role}.sh").read_text().splitlines()[-1]
    module, given = last.partition(" -m ")[2].split(f" {role} ")
    assert last.startswith("exec ") and given == '"$@"'
    return [sys.executable, "-m", module, role]


def texts(report: dict, wanted: str) -> list[str]:
    """Subject, text and remedy of each finding with this status."""
    found = (one for section in report["sections"] for one in section["findings"])
    return [f"{one['subject']}: {one['text']}: {one['remedy']}" for one in found if one["status"] == wanted]


def processes(host) -> dict[str, int]:
    """Title of each process, and its number; without those that a bare host has."""
    lines = host.sh("ps -eo pid=,args= | grep -v -e sshd -e 'sleep 3600' -e 'ps -eo' -e 'sh -' || true").splitlines()
    return {line.split(None, 1)[1]: int(line.split()[0]) for line in lines}


def pid_of(host, program: str) -> int:
    return int(host.sh(f"pgrep -x {program}"))


def listening(host) -> set[int]:
    """Ports that listen on an address that others can reach."""
    lines = host.sh("ss -Hltn").splitlines()
    addresses = [line.split()[3].rpartition(":") for line in lines]
    return {int(port) for address, _, port in addresses if not address.startswith(("127.", "[::1]", "[::ffff:127."))}


def test_up(hosts):
    a, b, _ = hosts
    code, report = up(a, b, "--env", "NCCL_IB_HCA=mlx5")
    assert (code, report["sound"], report["changed"]) == (0, True, True), texts(report, "problem")
    assert any("2 nodes with 2 GPUs" in text for text in texts(report, "ok"))
    code, found = status(a)
    assert (code, found["whole"], found["gpus"], found["free_gpus"]) == (0, True, 2, 2)
    assert [(node["address"], node["state"], node["head"]) for node in found["nodes"]] == [
        (a.address, "running", True), (b.address, "running", False),
    ]  # fmt: skip
    shown = cluster(a, "status")
    assert "1 of 1" in shown.stdout and "10.77.0.2" in shown.stdout


def test_what_ray_was_started_with(hosts):
    for host in hosts[:2]:
        words = host.sh(f"tr '\\0' '\\n' </proc/{pid_of(host, 'raylet')}/environ").splitlines()
        environ = dict(word.split("=", 1) for word in words if "=" in word)
        assert environ["VLLM_HOST_IP"] == host.address
        assert {environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")} == {"eth0"}
        assert environ["RAY_AUTH_MODE"] == "token" and environ["NCCL_IB_HCA"] == "mlx5"
        assert RAY_SETTINGS.items() <= environ.items()


def test_the_ports_are_those_of_the_table(hosts):
    single = {port for port in PORTS if port.first == port.last and not port.extra}
    assert listening(hosts[0]) == {PORT, *(port.first for port in single)}
    assert listening(hosts[1]) == {PORT, *(port.first for port in single if not port.head_only)}


def test_the_token_is_in_its_file_and_nowhere_else(hosts):
    a, b, _ = hosts
    token = a.sh(f"cat {TOKEN}")
    assert b.sh(f"cat {TOKEN}") == token and len(token) == 64
    for host in (a, b):
        assert host.sh(f"stat -c %a {TOKEN} ~/.ray").split() == ["600", "700"]
        private = host.sh("find ~/.config/hunyuan-vllm/cluster -type f -printf '%m '").split()
        assert set(private) == {"600"}
        found = host.sh(f"grep -rlF -f {TOKEN} ~/.ray ~/.config ~/.cache /tmp /run /var/log /dev/shm || true")
        assert found.split() == [TOKEN]
        assert host.sh(f"cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | grep -cF -a -f {TOKEN} || true") == "0\n"


def test_strangers_are_refused(hosts):
    a, _, c = hosts
    c.sh(f"umask 077; mkdir -p ~/.ray; echo {'0' * 64} >{TOKEN}")
    ask = [sys.executable, "-c", STRANGER, f"{a.address}:6379"]
    without = c.run(*ask, env=c.environment(RAY_AUTH_MODE="disabled")).stdout
    other = c.run(*ask, env=c.environment(RAY_AUTH_MODE="token")).stdout
    # And one that has it is not, from the same host.
    c.sh(f"cat >{TOKEN}", input=a.sh(f"cat {TOKEN}"))
    assert c.run(*ask, env=c.environment(RAY_AUTH_MODE="token")).stdout == "2\n"
    c.sh(f"rm {TOKEN}")
    assert "Unauthenticated" in without or "token" in without, without
    assert "Unauthenticated" in other or "token" in other, other
    http = c.sh(f"curl -s -o /dev/null -w '%{{http_code}}' -X POST http://{a.address}:6382/get_or_create_runtime_env")
    assert http in ("401", "403")


def test_a_second_up_changes_nothing(hosts):
    a, b, _ = hosts
    before = [pid_of(host, "raylet") for host in (a, b)]
    code, report = up(a, b, "--env", "NCCL_IB_HCA=mlx5")
    assert (code, report["changed"]) == (0, False)
    assert any("nothing was changed" in text for text in texts(report, "ok"))
    assert [pid_of(host, "raylet") for host in (a, b)] == before


def test_a_node_that_died_is_named_and_taken_in_again(hosts):
    a, b, _ = hosts
    head = pid_of(a, "raylet")
    b.sh(f"kill -9 {pid_of(b, 'raylet')}")
    code, found = status(a)
    assert (code, found["whole"]) == (1, False)
    assert [node["state"] for node in found["nodes"]] == ["running", "stopped"]
    assert found["nodes"][1]["problems"][0]["remedy"] == "run hunyuan-vllm cluster up again"
    code, report = up(a, b, "--env", "NCCL_IB_HCA=mlx5")
    assert (code, report["changed"]) == (0, True), texts(report, "problem")
    assert any(f"{b.address}: an earlier Ray was ended" in text for text in texts(report, "ok"))
    assert pid_of(a, "raylet") == head
    assert status(a)[1]["gpus"] == 2


def test_a_host_that_is_silent_is_named_and_nothing_is_touched(hosts):
    a, b, _ = hosts
    before = processes(a)
    b.unplug()
    started = time.monotonic()
    try:
        code, report = up(a, b, "--env", "NCCL_IB_HCA=mlx5", "--timeout", "2")
        found = cluster(a, "status", "--json", "--timeout", "2")
        time.sleep(max(0.0, GIVEN_UP - (time.monotonic() - started)))
    finally:
        b.plug()
    # What was resolving its address during the partition still fails, for up to three seconds.
    eventually(lambda: a.run(sys.executable, "-c", REACH, b.address, check=False).returncode == 0)
    assert code == 1 and not report["changed"]
    assert any(text.startswith(f"{b.address}: no answer from {b.address} port {PORT}") or "unreachable" in text
               for text in texts(report, "problem"))  # fmt: skip
    assert json.loads(found.stdout)["nodes"][1]["state"] == "unreached"
    assert processes(a).keys() >= before.keys()


def test_down_leaves_nothing(hosts):
    a, b, _ = hosts
    # The partition above was long enough for the head to give the node up.
    code, report = up(a, b, "--env", "NCCL_IB_HCA=mlx5")
    assert (code, report["sound"]) == (0, True), texts(report, "problem")
    token = {"RAY_AUTH_MODE": "token"}
    idle = a.start(sys.executable, "-c", IDLE_DRIVER, stdout=subprocess.PIPE, text=True, env=a.environment(**token))
    assert idle.stdout.readline() == "joined\n"
    code, report = up(a, b)
    assert code == 1 and any("used by the driver" in text for text in texts(report, "problem")), texts(
        report, "problem"
    )
    kill(a, "*print*joined*")
    idle.wait(timeout=30)
    driver = a.start(sys.executable, "-c", DRIVER, stdout=subprocess.PIPE, text=True, env=a.environment(**token))
    assert driver.stdout.readline().split() == [a.address, b.address]
    code, found = status(a)
    assert (code, found["free_gpus"]) == (0, 0)
    assert any("Worker" in work for work in found["nodes"][1]["works"])
    # Another cluster is not put in the place of one that is in use.
    code, report = up(a, b)
    assert code == 1 and any("another Ray runs there, used by" in text for text in texts(report, "problem"))
    b.sh(f"kill -9 {pid_of(b, 'raylet')}")  # its workers are stale now
    done = cluster(a, "down", "--json")
    assert done.returncode == 0, done.stdout
    driver.communicate(timeout=30)
    for host in (a, b):
        assert processes(host) == {}
        assert listening(host) == {PORT}
    again = cluster(a, "down")
    assert again.returncode == 0 and again.stdout.count("no Ray ran") == 2
    code, found = status(a)
    assert code == 1 and {node["state"] for node in found["nodes"]} == {"stopped"}


def test_tls_and_the_scripts_of_one_host(hosts):
    a, b, _ = hosts
    code, report = up(a, b, "--tls")
    assert code == 0, texts(report, "problem")
    directory = f"{HOME}/.config/hunyuan-vllm/cluster/tls"
    assert a.sh(f"cd {directory}; stat -c '%a %n' *").splitlines() == [
        "600 10.77.0.1.crt", "600 10.77.0.1.key", "600 authority.crt", "600 authority.key",
    ]  # fmt: skip
    assert b.sh(f"ls {directory}").split() == ["10.77.0.2.crt", "10.77.0.2.key", "authority.crt"]
    verified = "echo | openssl s_client -alpn h2 -connect {}:{} -CAfile {}/authority.crt -cert {} -key {}"
    verified += " -verify_ip {} 2>&1 | tr -cd '[:print:]\\n'"
    mine = (f"{directory}/10.77.0.1.crt", f"{directory}/10.77.0.1.key")
    for host, port in ((a, 6379), (b, 6380)):
        said = a.sh(verified.format(host.address, port, directory, *mine, host.address))
        assert "Verify return code: 0 (ok)" in said and "TLSv1.3" in said
    assert cluster(a, "down").returncode == 0

    # As deploy/ray_head.sh and ray_worker.sh do it, but without their look at the environment, which could replace it.
    joined = [*script_command("worker"), a.address, "--gpus", "1", "--tls"]
    early = b.run(*joined, check=False)
    assert early.returncode == 2 and "no head answers at 10.77.0.1:6379" in early.stderr
    head = a.run(*script_command("head"), "--gpus", "1", "--tls", timeout=120)
    assert "on each other node: sh deploy/ray_worker.sh 10.77.0.1" in head.stderr
    b.sh(f"mv {TOKEN} {TOKEN}.away")
    without = b.run(*joined, check=False)
    assert without.returncode == 2 and f"there is no token in {TOKEN}: copy the head's" in without.stderr
    b.sh(f"mv {TOKEN}.away {TOKEN}")
    assert "joined the cluster" in b.run(*joined, timeout=120).stderr
    assert "nothing was changed" in b.run(*joined).stderr
    assert status(a)[1]["gpus"] == 2
    for host in (a, b):
        assert "processes of Ray ended" in host.run(*script_command("stop")).stderr
        assert not [title for title in processes(host) if "ray" in title]
    assert "no Ray ran here" in b.run(*script_command("stop")).stderr


def test_mistakes(hosts):
    a, b, c = hosts
    told = cluster(c, "status")
    assert (told.returncode, told.stdout) == (2, "") and "no cluster was started from here" in told.stderr
    for words, said in (
        (["--hosts", a.address, "--env", "HF_TOKEN=x"], "--env HF_TOKEN"),
        (["--hosts", a.address, "--env", "VLLM_HOST_IP=x"], "the cluster sets it itself"),
        (["--hosts", a.address, "--logical-gpus"], "give their number"),
        (["--hosts", b.address, "--ssh-port", str(PORT)], "this machine is not among --hosts"),
    ):
        done = cluster(a, "up", *words)
        assert done.returncode == 2 and said in done.stderr, done
