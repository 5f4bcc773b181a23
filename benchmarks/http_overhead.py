"""What HTTP costs: the server compared with the offline engine on the same requests.

    python benchmarks/http_overhead.py

`hunyuan-vllm serve` on loopback and vLLM's `LLM`, each with its default processes, run interleaved on the demo model
and on the benchmark model of 1.1 billion parameters. Requests are greedy completions of random token ids, of fixed
lengths. The client, on the same cores, keeps a fixed number of requests active; the offline engine has that many
slots.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from common import Report, Spread, checkpoint_option, interleaved, mid_checkpoint, note, options, ratios
from processes import Child, random_prompts

from hunyuan_vllm import demo

MIB = 2**20
CONCURRENCY = (1, 8)
REQUESTS = {"demo": {1: 16, 8: 64}, "mid": {1: 3, 8: 8}}
VOCABULARY = 1800  # ordinary tokens of the demo model, whose tokenizer the benchmark model borrows
START_TIMEOUT = 600.0  # seconds
SPINNING = 1.5
Request = tuple[list[int], int]
"""Token ids, and how many to generate."""
COMMON = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}


class Offline:
    """`LLM` with its engine in processes of its own, to be built in a `Child`."""

    def __init__(self, model: Path, settings: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(model=str(model), max_num_seqs=max(CONCURRENCY), seed=0, **settings)

    def serve(self, requests: Sequence[Request], concurrency: int) -> float:
        """Seconds for all requests."""
        from vllm import SamplingParams

        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for _, length in requests]
        step = len(prompts) if concurrency > 1 else 1
        begin = time.perf_counter()
        for first in range(0, len(prompts), step):
            self.llm.generate(prompts[first : first + step], params[first : first + step], use_tqdm=False)
        return time.perf_counter() - begin

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


class Server:
    """`hunyuan-vllm serve` on a free loopback port."""

    def __init__(self, model: Path, settings: dict[str, Any], environ: dict[str, str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = Path(tempfile.gettempdir()) / f"hunyuan-vllm-bench-{os.getpid()}-server-{port}.log"
        flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        program = Path(sys.executable).with_name("hunyuan-vllm")
        # -O2: `serve` does not compile the demo model by default, `LLM` does.
        command: list[str | Path] = [program, "serve", "--generation-config", "vllm", "-O2", *flags]
        ours = {"MODEL_PATH": str(model), "PORT": str(port)}
        with self.log.open("w") as output:
            self._process = subprocess.Popen(command, env=os.environ | environ | ours, stdout=output, stderr=output)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)
        if kind is None:
            self.log.unlink()

    def ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/health"):
                    note("server is ready")
                    return
            except OSError:
                time.sleep(0.5)
        raise SystemExit(f"the server did not start (its output: {self.log})")

    def serve(self, requests: Sequence[Request], concurrency: int, stream: bool) -> float:
        """Seconds for all requests."""
        return asyncio.run(_ask_all(self.url, requests, concurrency, stream))


class Settled:
    """Runs one engine or the other, once the one that ran before is at rest: vLLM's workers spin for a second."""

    def __init__(self) -> None:
        self._last = ""

    def run(self, engine: str, work: Callable[[], float]) -> float:
        if engine != self._last:
            time.sleep(SPINNING)
        self._last = engine
        return work()


async def _ask_all(url: str, requests: Sequence[Request], concurrency: int, stream: bool) -> float:
    waiting = iter(requests)
    async with aiohttp.ClientSession(url) as client:

        async def ask_in_turn() -> None:
            for prompt, length in waiting:
                await _ask(client, prompt, length, stream)

        begin = time.perf_counter()
        await asyncio.gather(*(ask_in_turn() for _ in range(concurrency)))
        return time.perf_counter() - begin


async def _ask(client: aiohttp.ClientSession, prompt: list[int], length: int, stream: bool) -> None:
    request: dict[str, Any] = {"model": "hunyuan", "prompt": prompt, "max_tokens": length, "stream": stream}
    async with client.post("/v1/completions", json=request | {"temperature": 0, "ignore_eos": True}) as answer:
        body = await answer.read()  # of a stream in many pieces, which cost this client little
    if stream:
        complete = body.endswith(b"data: [DONE]\n\n")
    else:
        complete = json.loads(body).get("usage", {}).get("completion_tokens") == length
    if not (answer.ok and complete):
        raise SystemExit(f"the server answered {answer.status}: {body.decode()[:500]}")


def main() -> None:
    parser = options(__doc__, rounds=4, threads=False)
    checkpoint_option(parser)
    parser.add_argument("--models", nargs="+", choices=REQUESTS, default=list(REQUESTS))
    parser.add_argument("--prompt-tokens", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=32, help="default: %(default)s")
    parser.add_argument(
        "--bind",
        nargs="+",
        default=[""],
        help="values of VLLM_CPU_OMP_THREADS_BIND to compare, such as auto 0-1 nobind (default: the environment's)",
    )
    arguments = parser.parse_args()
    report = Report("http_overhead", arguments)
    paths = {"demo": demo.path(), "mid": arguments.checkpoint}
    if "demo" in arguments.models and not (demo.path() / "model.safetensors").exists():
        note("the demo model has no weights here: left out")
        arguments.models.remove("demo")
    if "mid" in arguments.models:
        mid_checkpoint(arguments.checkpoint)
    for name in arguments.models:
        _compare(name, paths[name], report, arguments)
    report.show()


def _compare(name: str, model: Path, report: Report, arguments: Any) -> None:
    settings: dict[str, Any] = dict(
        dtype="bfloat16",
        max_model_len=arguments.prompt_tokens + 2 * arguments.new_tokens,
        kv_cache_memory_bytes=64 * MIB,
        tokenizer=str(demo.path()),
    )
    new_tokens = arguments.new_tokens
    with ExitStack() as stack:
        engines: dict[str, tuple[Server, Child]] = {}
        for bind in arguments.bind:  # one after another: they compile into the same cache
            environ = COMMON | ({"VLLM_CPU_OMP_THREADS_BIND": bind} if bind else {})
            server = stack.enter_context(Server(model, settings, environ))
            server.ready()
            offline = Child(f"offline {name} {bind}".strip(), Offline, model, settings, environ=environ)
            engines[bind] = server, stack.enter_context(offline).ready()
        for concurrency in CONCURRENCY:
            count = REQUESTS[name][concurrency]
            prompts = random_prompts(VOCABULARY, [arguments.prompt_tokens] * count, concurrency)
            lengths = [new_tokens // 2 + new_tokens * place // (count - 1) for place in range(count)]
            random.Random(concurrency).shuffle(lengths)
            work = ([*zip(prompts, lengths, strict=True)], concurrency)
            settled = Settled()
            ways: dict[tuple[str, str], Callable[[], float]] = {}
            for bind, (server, offline) in engines.items():
                run_offline = partial(settled.run, f"offline {bind}")
                run_server = partial(settled.run, f"server {bind}")
                ways[bind, "offline"] = partial(run_offline, partial(offline.call, "serve", *work))
                ways[bind, "HTTP"] = partial(run_server, partial(server.serve, *work, stream=False))
                ways[bind, "HTTP, streamed"] = partial(run_server, partial(server.serve, *work, stream=True))
            note(f"{name}, {concurrency} at a time")
            for run in ways.values():
                run()  # warms up
            seconds = interleaved(ways, arguments.rounds, notes=False)
            first = arguments.bind[0]
            for (bind, way), times in seconds.items():
                report.add(
                    "Completions, as a share of the offline engine's speed",
                    model=name,
                    at_a_time=concurrency,
                    bind=bind or "default",
                    way=way,
                    requests_a_second=Spread.of(count / spent for spent in times),
                    tokens_a_second=Spread.of(sum(lengths) / spent for spent in times),
                    of_offline=ratios(seconds[bind, "offline"], times),
                    of_first_bind=ratios(seconds[first, way], times),
                )


if __name__ == "__main__":
    main()
