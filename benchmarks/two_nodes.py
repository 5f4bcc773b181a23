"""How long does an operator wait, from two bare nodes to an answer? The commands of docs/deploy.md, in its order.

    python benchmarks/two_nodes.py             # login_ssh.py, cluster up, run_server.sh, openapi.sh, cluster down
    python benchmarks/two_nodes.py --by-hand   # ray_head.sh, ray_worker.sh, ray_stop.sh instead of cluster up, down
    python benchmarks/two_nodes.py --rounds 3 --json FILE

Two hosts in namespaces (as root, with iproute2 and openssh-server), each with an SSH server and nothing in its home;
the environment of step 1 is this checkout's. The demo model is served over both by tensor parallelism, on CPUs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "cluster")]

from hosts import HOME, Host, Network, Sshd, missing  # noqa: E402
from operator_at_host import PASSWORD, PORT, options  # noqa: E402
from ray_hosts.cluster import BIN, ON_CPUS, SHELL  # noqa: E402
from ray_hosts.served import Served  # noqa: E402

CLUSTER = [str(BIN / "hunyuan-vllm"), "cluster"]
SERVE = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(2**26)]
# Ray, told that each host has one GPU, schedules vLLM's CPU platform on it.
VARIABLES = [word for pair in ON_CPUS.items() for word in ("--env", "=".join(pair))]
LOGICAL = ["--logical-gpus", "--despite-warnings", *VARIABLES]

Steps = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--by-hand", action="store_true", help="start and end Ray with ray_head.sh, ray_worker.sh, ray_stop.sh"
    )
    parser.add_argument("--rounds", type=int, default=1, help="each with new hosts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the seconds of each step there")
    arguments = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    rounds: list[Steps] = []
    for number in range(arguments.rounds):
        rounds.append(one_round(arguments.by_hand))
        print(f"round {number + 1}: " + ", ".join(f"{step} {taken:.1f} s" for step, taken in rounds[-1].items()))
    print("| step | median | min–max |\n|---|---|---|")
    for step in rounds[0]:
        taken = sorted(one[step] for one in rounds)
        print(f"| {step} | {taken[len(taken) // 2]:.1f} s | {taken[0]:.1f} to {taken[-1]:.1f} s |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rounds, indent=1))
    return 0


def one_round(by_hand: bool) -> Steps:
    """Seconds of each step; a step that fails ends the program with what it said."""
    steps: Steps = {}

    def timed(name: str, step: Callable[[], object]) -> None:
        began = time.monotonic()
        step()
        steps[name] = time.monotonic() - began

    with Network() as network:
        head, worker, client = (network.add(name) for name in ("head", "worker", "client"))
        servers = [Sshd(host, PORT, PASSWORD) for host in (head, worker)]
        ips = f"{head.address},{worker.address}"
        head.sh("umask 077; cat >~/password", input=PASSWORD)
        login = ["--ips", ips, "--port", str(PORT), "--password-file", f"{HOME}/password", *options(*servers)]
        timed(
            "`login_ssh.py`: keys, pins, all pairs proved",
            lambda: _run(head, sys.executable, _deploy("login_ssh.py"), *login),
        )
        if by_hand:
            gpus = ["--ifname", "eth0", "--gpus", "1", *VARIABLES]
            timed("`ray_head.sh`", lambda: _run(head, "sh", _deploy("ray_head.sh"), *gpus))
            token = head.sh("cat ~/.ray/auth_token")
            worker.sh("umask 077; mkdir -p ~/.ray; cat >~/.ray/auth_token", input=token)
            timed("`ray_worker.sh`", lambda: _run(worker, "sh", _deploy("ray_worker.sh"), head.address, *gpus))
        else:
            up = [*CLUSTER, "up", "--hosts", ips, "--ssh-port", str(PORT), "--ifname", "eth0", "--gpus-per-node", "1"]
            timed("`cluster up`: checks, token, Ray on both", lambda: _run(head, *up, *LOGICAL))
            timed("`cluster up` again: nothing to do", lambda: _run(head, *up, *LOGICAL))
            timed("`cluster status`", lambda: _run(head, *CLUSTER, "status"))
        server = Served(
            head, ["sh", _deploy("run_server.sh"), *SERVE], {**SHELL, **ON_CPUS, "LOCAL_IP": head.address}, client
        )
        steps["`run_server.sh` until it is ready"] = server.wait_until_ready(600)
        timed(
            "`openapi.sh`: an answer",
            lambda: _run(head, "sh", _deploy("openapi.sh"), "Why is sea water salty?", LOCAL_IP=head.address),
        )
        timed("Ctrl-C until it has ended", server.stop)
        if by_hand:
            timed(
                "`ray_stop.sh` on both", lambda: [_run(host, "sh", _deploy("ray_stop.sh")) for host in (worker, head)]
            )
        else:
            timed("`cluster down`", lambda: _run(head, *CLUSTER, "down"))
        left = {host.name: _left(host) for host in (head, worker)}
        if any(left.values()):
            raise SystemExit(f"processes are left: {left}")
    return steps


def _deploy(script: str) -> str:
    return str(ROOT / "deploy" / script)


def _run(host: Host, *argv: str, **environ: str) -> None:
    done: subprocess.CompletedProcess[str] = host.run(*argv, check=False, env={**SHELL, **environ}, timeout=300)
    if done.returncode != 0:
        raise SystemExit(f"{host.name}: {' '.join(argv)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def _left(host: Host) -> list[str]:
    """Processes of Ray or vLLM."""
    return host.sh("ps -eo args= | grep -i -e '[r]ay' -e '[v]llm' || true").splitlines()


if __name__ == "__main__":
    sys.exit(main())
