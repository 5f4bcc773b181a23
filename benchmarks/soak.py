"""A saturated server: every request must be answered, memory flat, and all cache blocks free at the end.

    python benchmarks/soak.py --minutes 20

Starts `hunyuan-vllm serve` with the demo model on loopback and keeps more requests active than its engine runs at once:
short and long answers, streamed and whole, chat and completions, several at once (n), structured output with schemas
that are new each time, and streams whose client disconnects. Each answer's status, length and form are checked. Memory
(of all processes), files and threads are sampled every half minute and compared from the end of the first fifth. The
exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any

import httpx
from common import note

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hostile import Footprint, footprint, wait_until_idle  # noqa: E402
from serving import Server, running_server  # noqa: E402

KEY = "a-key-for-the-soak"
PLACES = 16
MIB = 2**20
SAMPLE = 30.0  # seconds
POOL = 4  # threads that pools may still start
GROWTH = 0.03  # of memory, between the end of warming up and the end
WORDS = "sea salt water river ocean moon tide wind cloud rain 海 水 盐 风 雨 🌊".split()


class Wrong(Exception):
    """An answer that is not what it must be."""


def _chat(random: Random, **more: Any) -> dict[str, Any]:
    text = " ".join(random.choices(WORDS, k=random.randrange(3, 60)))
    return {
        "messages": [{"role": "user", "content": f"{text}?"}],
        "temperature": 1,
        "seed": random.randrange(10**6),
        **more,
    }


async def whole(client: httpx.AsyncClient, random: Random) -> None:
    n, length = random.choice([1, 1, 1, 3]), random.choice([8, 32, 96])
    answer = await _post(client, "/v1/chat/completions", _chat(random, n=n, max_tokens=length, ignore_eos=True))
    if answer["usage"]["completion_tokens"] != n * length or len(answer["choices"]) != n:
        raise Wrong(f"{answer['usage']} for {n} times {length}")


async def long(client: httpx.AsyncClient, random: Random) -> None:
    """A prompt and an answer that fill the context."""
    tokens = [random.randrange(1800) for _ in range(700)]
    body = {"prompt": tokens, "max_tokens": 300, "ignore_eos": True}
    answer = await _post(client, "/v1/completions", body)
    if answer["usage"]["completion_tokens"] != 300:
        raise Wrong(str(answer["usage"]))


async def streamed(client: httpx.AsyncClient, random: Random) -> None:
    length = random.choice([16, 64, 128])
    body = _chat(random, max_tokens=length, ignore_eos=True, stream=True, stream_options={"include_usage": True})
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = [line async for line in answer.aiter_lines() if line]
    if answer.status_code != 200 or lines[-1] != "data: [DONE]":
        raise Wrong(f"status {answer.status_code}, {lines[-1:]}")
    if json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] != length:
        raise Wrong(f"a stream of {length} ends with {lines[-2]}")


async def schema(client: httpx.AsyncClient, random: Random) -> None:
    """Names that no schema had before: what is compiled for them must not be kept for ever."""
    names = [f"{random.choice(WORDS)}{random.randrange(10**6)}" for _ in range(3)]
    properties = {name: {"enum": [name, f"not {name}"]} for name in names}
    wanted = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": wanted}}
    answer = await _post(client, "/v1/chat/completions", _chat(random, max_tokens=200, response_format=form))
    found = json.loads(answer["choices"][0]["message"]["content"])
    if list(found) != names or not all(value.endswith(name) for name, value in found.items()):
        raise Wrong(f"{found} by {names}")


async def regex(client: httpx.AsyncClient, random: Random) -> None:
    pattern = f"({random.choice(WORDS)}|{random.randrange(10**6)})-[0-9]{{2,5}}"
    body = _chat(random, max_tokens=60, structured_outputs={"regex": pattern})
    text = (await _post(client, "/v1/chat/completions", body))["choices"][0]["message"]["content"]
    if not re.fullmatch(pattern, text):
        raise Wrong(f"{text!r} by {pattern}")


async def leaving(client: httpx.AsyncClient, random: Random) -> None:
    """A client that goes away in the middle of three streams of one request."""
    body = _chat(random, max_tokens=400, ignore_eos=True, stream=True, n=random.choice([1, 3]))
    parts = random.randrange(40)
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise Wrong(f"status {answer.status_code}")
        async for _ in answer.aiter_lines():
            parts -= 1
            if parts < 0:
                return


MIX: dict[Callable[[httpx.AsyncClient, Random], Awaitable[None]], int] = {
    whole: 30, streamed: 25, leaving: 15, schema: 12, regex: 12, long: 6,
}  # fmt: skip


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    if answer.status_code != 200:
        raise Wrong(f"status {answer.status_code}: {answer.text[:300]}")
    content: dict[str, Any] = answer.json()
    return content


async def _load(server: Server, seconds: float, at_a_time: int, seed: int) -> tuple[Counter[str], list[str]]:
    random, deadline = Random(seed), time.monotonic() + seconds
    answered: Counter[str] = Counter()
    wrong: list[str] = []
    headers = {"Authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=at_a_time)
    async with httpx.AsyncClient(
        base_url=server.url, headers=headers, timeout=300, limits=limits, trust_env=False
    ) as client:

        async def in_turn() -> None:
            while time.monotonic() < deadline and server.process.poll() is None:
                kind = random.choices(list(MIX), list(MIX.values()))[0]
                try:
                    await kind(client, random)
                    answered[kind.__name__] += 1
                except (Wrong, httpx.HTTPError, ValueError, KeyError, IndexError) as error:
                    wrong.append(f"{kind.__name__}: {error!r}")

        await asyncio.gather(*(in_turn() for _ in range(at_a_time)))
    return answered, wrong


async def _watched(server: Server, arguments: argparse.Namespace) -> tuple[Counter[str], list[str], list[Footprint]]:
    """The load, with the server's footprint from time to time."""
    taken = [footprint(server.process.pid)]
    load = asyncio.create_task(_load(server, 60 * arguments.minutes, arguments.at_a_time, arguments.seed))
    while not (await asyncio.wait({load}, timeout=SAMPLE))[0]:
        taken.append(footprint(server.process.pid))
        note(f"{taken[-1].memory / MIB:,.0f} MiB, {taken[-1].files} files, {taken[-1].threads} threads")
    answered, wrong = load.result()
    return answered, wrong, taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="default: %(default)s")
    parser.add_argument("--at-a-time", type=int, default=32, help=f"requests; places: {PLACES} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    arguments = parser.parse_args()
    flags = ("--max-model-len=1024", f"--max-num-seqs={PLACES}")
    with running_server(*flags, VLLM_API_KEY=KEY) as server:
        answered, wrong, taken = asyncio.run(_watched(server, arguments))
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60, trust_env=False) as client:
            wait_until_idle(client)
        time.sleep(2)
        end = footprint(server.process.pid)
    warm = taken[max(1, len(taken) // 5)] if len(taken) > 1 else taken[0]
    print(f"{sum(answered.values())} answered: " + ", ".join(f"{n} {kind}" for kind, n in answered.most_common()))
    for name, one in (("start", taken[0]), ("warm", warm), ("end, idle", end)):
        print(f"{name:10} {one.memory / MIB:8,.0f} MiB  {one.files:4} files  {one.threads:4} threads")
    problems = [f"{len(wrong)} not answered as they must be: {wrong[:5]}"] if wrong else []
    if end.memory > (1 + GROWTH) * warm.memory:
        problems.append(f"memory grew by {end.memory / warm.memory - 1:.1%}")
    if end.threads > warm.threads + POOL or end.files > warm.files or end.processes != warm.processes:
        problems.append("files, threads or processes were left behind")
    for problem in problems:
        print(f"WRONG: {problem}")
    print("no problems; the engine is idle and its cache free" if not problems else f"{len(problems)} problems")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
