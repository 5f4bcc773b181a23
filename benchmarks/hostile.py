"""Malformed and hostile requests: there must be no 5xx, no crash, no leak, and correct answers afterwards.

    python benchmarks/hostile.py --requests 10000 --seed 1

Starts `hunyuan-vllm serve` with the demo model and an API key on loopback. The requests are those of `tests/hostile`:
wrong types and values in every field, invalid JSON, deep nesting, huge numbers, invalid UTF-8, wrong lengths and
chunks, unusual headers, paths and methods, slow clients, and clients that disconnect. The first tenth warms the server
up; memory, files and threads are compared from there. The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

import httpx
from common import note

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hostile import Answer, attack, footprint, hostile_requests, wait_until_idle  # noqa: E402
from serving import running_server  # noqa: E402

KEY = "a-key-for-hostile-requests"
GROWTH = 1.15  # of memory, at most: caches of schemas and prompts fill up to their limits
SALT = {"messages": [{"role": "user", "content": "Why is sea water salty?"}], "temperature": 0, "max_tokens": 60}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--at-a-time", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for an answer (default: %(default)s)")
    parser.add_argument("--show", type=int, default=20, help="faults that are shown (default: %(default)s)")
    parser.add_argument("--schemathesis", metavar="COMMAND", help="run it as well, over the server's OpenAPI document")
    parser.add_argument("--seconds", type=int, default=240, help="that Schemathesis has (default: %(default)s)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep what the server printed")
    arguments = parser.parse_args()
    flags = ("--enforce-eager", "--max-model-len=1024", "--max-num-seqs=32")
    with running_server(*flags, VLLM_API_KEY=KEY) as server:
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=server.url, headers=headers, trust_env=False, timeout=120) as client:
            problems = _run(arguments, server, client)
            died = server.process.poll()
        if arguments.log:
            arguments.log.write_text("".join(server.output))
    if died is not None:
        problems.append(f"the server ended with status {died}")
    for problem in problems:
        print(f"WRONG: {problem}")
    print("no problems" if not problems else f"{len(problems)} problems")
    raise SystemExit(bool(problems))


def _run(arguments: argparse.Namespace, server, client: httpx.Client) -> list[str]:  # type: ignore[no-untyped-def]
    right = client.post("/v1/chat/completions", json=SALT).json()["choices"][0]["message"]["content"]
    requests = list(hostile_requests(arguments.seed, arguments.requests, KEY))
    warm = len(requests) // 10
    answers: list[Answer] = []
    begin = time.perf_counter()
    for name, part in (("warming up", requests[:warm]), ("measured", requests[warm:])):
        note(f"{len(part)} requests, {name}")
        answers += asyncio.run(attack(server.url, part, arguments.at_a_time, arguments.timeout))
        if server.process.poll() is not None:
            print("".join(server.output[-60:]))
            break
        wait_until_idle(client)
        if name == "warming up":
            before = footprint(server.process.pid)
    seconds = time.perf_counter() - begin
    failures = 0
    if arguments.schemathesis and server.process.poll() is None:
        failures = _schemathesis(arguments, server.url)
    faults = [answer for answer in answers if answer.fault]
    _show(answers, seconds)
    problems = [f"{len(faults)} faults"] if faults else []
    if failures:
        problems.append(f"Schemathesis found {failures} failures")
    for answer in faults[: arguments.show]:
        print(
            f"FAULT {answer.request.kind}: {answer.fault}: {answer.request.about[:400]}\n      {answer.body[-400:]!r}"
        )
    if server.process.poll() is not None:
        return problems
    time.sleep(2)
    after = footprint(server.process.pid)
    print(f"before {before}\nafter  {after}")
    if after.memory > GROWTH * before.memory:
        problems.append("memory grew")
    if after.files > before.files + 5 or after.threads > before.threads + 5 or after.processes != before.processes:
        problems.append("files, threads or processes were left behind")
    again = client.post("/v1/chat/completions", json=SALT).json()["choices"][0]["message"]["content"]
    if again != right:
        problems.append(f"it answers otherwise than before: {again!r}, {right!r}")
    return problems


def _schemathesis(arguments: argparse.Namespace, url: str) -> int:
    """Requests made from what the document says of each route, valid and invalid: the routes that answered with 5xx.

    Its exit status says less: it is also that of a route for which it could not make requests.
    """
    program = Path(arguments.schemathesis)
    command = [str(program.absolute()) if program.exists() else str(program), "run", f"{url}/openapi.json"]
    command += ["-H", f"Authorization: Bearer {KEY}", "-c", "not_a_server_error", "--seed", str(arguments.seed)]
    command += ["--max-time", str(arguments.seconds), "--request-timeout", str(arguments.timeout), "--no-shrink"]
    command += ["--continue-on-failure", "-w", "2", "--phases", "examples,coverage,fuzzing"]
    with tempfile.TemporaryDirectory() as directory:  # where it leaves files of its own, too
        subprocess.run([*command, "--report-junit-path", "report.xml"], cwd=directory)
        return len(ElementTree.parse(f"{directory}/report.xml").findall(".//failure"))


def _show(answers: list[Answer], seconds: float) -> None:
    print(f"{len(answers)} requests in {seconds:.0f} s")
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        table[answer.request.kind][str(answer.status)] += 1
    for kind, counts in sorted(table.items()):
        print(f"  {kind:20} {sum(counts.values()):6}  " + "  ".join(f"{one}: {n}" for one, n in sorted(counts.items())))


if __name__ == "__main__":
    main()
