"""Failures of a server on two hosts: how soon clients get an error, and how soon it serves again.

    python benchmarks/ray_faults.py                        # each kind once
    python benchmarks/ray_faults.py --runs 5 --json FILE   # the table in benchmarks/README.md
    python benchmarks/ray_faults.py --only partition --runs 5

Two hosts in namespaces (as root, with iproute2 and openssh-server), Ray on both, and the demo model over both with
`hunyuan-vllm serve --supervise`; eight clients are streaming when the fault occurs. "told" is the time until the last
client has its complete answer or an error; "back" is the time from the return of the host, or of Ray on it, to a
generated token. The supervisor's wait before a restart is limited to 1 s. After each run processes, their memory, open
files and what is left in /dev/shm and /tmp are counted on both hosts: nothing may grow from the first run to the last.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hosts import Network, missing  # noqa: E402
from ray_hosts import RayHosts  # noqa: E402
from ray_hosts.fault_run import Outcome, inject_fault, reference, survey  # noqa: E402
from ray_hosts.faults import FAULTS  # noqa: E402

# What may be there after the last run beyond what was there after the first: Ray's own caches of connections and logs.
ALLOWED = {"processes": 4, "files": 40, "shared": 0, "sockets": 0, "memory": 300, "workers": 0}

Survey = dict[str, dict[str, int]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1, help="runs of each kind")
    parser.add_argument("--only", default="", metavar="WORDS", help="kinds with these words in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes there, after each run")
    arguments = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    kinds = [kind for kind in FAULTS if arguments.only in kind]
    if not kinds:
        parser.error(f"--only {arguments.only!r} names none of: {', '.join(FAULTS)}")
    outcomes: dict[str, list[Outcome]] = {kind: [] for kind in kinds}
    surveys: list[Survey] = []
    with Network() as network:
        cluster = RayHosts(network)
        cluster.start(cluster.head)
        cluster.start(cluster.worker)
        server = cluster.serve("--supervise", "--max-restart-wait", "1")
        print(f"first start: ready after {server.wait_until_ready(600):.0f} s", flush=True)
        expected = reference(server)
        for run in range(arguments.runs):
            for kind in kinds:
                outcome = inject_fault(cluster, server, FAULTS[kind], expected, timeout=600)
                outcomes[kind].append(outcome)
                surveys.append({host.name: survey(host) for host in (cluster.head, cluster.worker)})
                note = f"told {outcome.told:.1f} s, back {outcome.recovered:.0f} s, {outcome.wrong} wrong"
                print(f"{kind}, run {run + 1}: {note}, stale workers {outcome.stale}, {surveys[-1]}", flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps(_as_json(outcomes, surveys), indent=1))
    show(outcomes)
    grown = growth(surveys)
    print("\n".join(["grown:", *grown]) if grown else f"nothing has grown over {len(surveys)} runs")
    bad = any(outcome.wrong or outcome.stale for runs in outcomes.values() for outcome in runs)
    return int(bad or bool(grown))


def show(outcomes: dict[str, list[Outcome]]) -> None:
    """The table: the worst of each kind's runs."""
    print("| fault | runs | clients told, worst | wrong answers | service back, worst | stale workers |")
    print("|---|---|---|---|---|---|")
    for kind, runs in outcomes.items():
        told, back = max(outcome.told for outcome in runs), max(outcome.recovered for outcome in runs)
        wrong, stale = sum(outcome.wrong for outcome in runs), sum(sum(outcome.stale.values()) for outcome in runs)
        print(f"| {kind} | {len(runs)} | {told:.1f} s | {wrong} | {back:.0f} s | {stale} |")


def growth(surveys: list[Survey]) -> list[str]:
    """What there is more of after the last run than after the first, beyond what is allowed."""
    first, last = surveys[0], surveys[-1]
    return [
        f"{name} of {host}: {first[host][name]} → {last[host][name]}"
        for host in first
        for name, allowed in ALLOWED.items()
        if last[host][name] > first[host][name] + allowed
    ]


def _as_json(outcomes: dict[str, list[Outcome]], surveys: list[Survey]) -> dict[str, object]:
    runs = {
        kind: [{name: value for name, value in asdict(outcome).items() if name != "answers"} for outcome in those]
        for kind, those in outcomes.items()
    }
    return {"outcomes": runs, "surveys": surveys}


if __name__ == "__main__":
    sys.exit(main())
