"""A fault of a server over two nodes while clients are streaming, and the outcome"""

import time
from dataclasses import dataclass

from hosts import Host

from ray_hosts.cluster import RayHosts
from ray_hosts.faults import Fault
from ray_hosts.served import Answer, Served

CLIENTS = 8
QUESTIONS = [
    {
        "model": "hunyuan", "prompt": f"The capital of country number {number} is", "max_tokens": 400,
        "temperature": 0, "repetition_penalty": 1, "ignore_eos": True,
    }
    for number in range(CLIENTS)
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """The outcome of one fault.

    Attributes:
        answers: each client's.
        wrong: clients whose complete answer differs from the one without a fault.
        told: seconds from the fault until the last client had its answer or its error.
        recovered: seconds from when what was lost was back until the server was ready again.
        stale: stale workers, by host.
    """

    answers: list[Answer]
    wrong: int
    told: float
    recovered: float
    stale: dict[str, int]


def reference(server: Served) -> list[str]:
    """The answers without a fault."""
    answers = server.stream(QUESTIONS).answers()
    assert all(answer.whole for answer in answers), answers
    return [answer.text for answer in answers]


def inject_fault(cluster: RayHosts, server: Served, fault: Fault, expected: list[str], timeout: float = 300) -> Outcome:
    """Inject the fault while a supervised server is ready and streaming, and wait until it is ready again."""
    runs = server.times_ready
    streams = server.stream(QUESTIONS)
    streams.wait_until_flowing()
    struck = time.monotonic()
    fault.strike(cluster)
    answers = streams.answers()
    back = fault.repair(cluster)
    ready = server.wait_until_ready(timeout, times=runs + 1)
    wrong = sum(answer.whole and answer.text != text for answer, text in zip(answers, expected, strict=True))
    workers = {host.name: survey(host)["workers"] for host in (cluster.head, cluster.worker)}
    told = max(answer.ended for answer in answers) - struck
    stale = {name: count - 1 for name, count in workers.items() if count > 1}
    return Outcome(answers, wrong, told, server.started + ready - back, stale)


def survey(host: Host) -> dict[str, int]:
    """What could grow on a host: processes and their memory (MiB), open files, files left behind, and workers."""
    script = (
        "echo processes $(ls -d /proc/[0-9]* | wc -l);"
        "echo files $(ls /proc/[0-9]*/fd 2>/dev/null | wc -l);"
        "echo shared $(find /dev/shm -type f | wc -l);"
        "echo sockets $(find /tmp -path /tmp/ray -prune -o -type s -print | wc -l);"
        "echo memory $(cat /proc/[0-9]*/statm 2>/dev/null | awk '{pages += $2 - $3} END {print int(pages / 256)}');"
        "echo workers $(cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -c '^ray::RayWorkerProc' || :)"
    )
    return {name: int(number) for name, number in map(str.split, host.sh(script).splitlines())}
