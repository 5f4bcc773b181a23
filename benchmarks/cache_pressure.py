"""Returning multi-turn sessions at equal cache memory, with CLA sharing on and off, by size of the working set.

    python benchmarks/cache_pressure.py

Every session starts with its own long prefix and adds a user message and an answer each turn. All sessions take their
first turn, then all their second, and so on, a few at a time. A later turn is cheap if the session's blocks are still
cached. The cache holds `--fit` sessions without sharing and twice as many with it, so a gain is expected only between
these two numbers. Two engines run interleaved, on a small network with a large cache (8 layers of 8 KV heads).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Report, Spread, interleaved, note, options, random_checkpoint, ratios
from processes import Child, Engine, engine_environ, random_prompts

BLOCK = 128  # tokens; vLLM's own choice on CPUs
SHAPE: dict[str, Any] = dict(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=128,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)
TOKEN_BYTES = 2 * 8 * 8 * 64 * 2  # K and V of 8 layers without sharing, 8 heads of 64, bfloat16


@dataclass(frozen=True)
class Load:
    """What each session does. Lengths in tokens."""

    prefix: int
    user: int
    answer: int
    turns: int
    in_flight: int

    @property
    def length(self) -> int:
        return self.prefix + self.turns * (self.user + self.answer)

    @property
    def blocks(self) -> int:
        return -(-self.length // BLOCK)


@dataclass(frozen=True)
class Served:
    """One run of all sessions."""

    seconds: float
    warm_seconds: float
    """Of all turns but the first."""
    warm_ttft: float
    """Median seconds to the first token in those."""
    cached: float
    """Share of their prompt tokens that came from the cache."""
    preemptions: int


class Sessions(Engine):
    """An engine that serves sessions, to be built in a `Child`."""

    def serve(self, count: int, load: Load, seed: int) -> Served:
        """Run `count` new sessions from an empty cache."""
        from vllm import SamplingParams

        self.llm.reset_prefix_cache()
        params = SamplingParams(temperature=0, max_tokens=load.answer, ignore_eos=True, detokenize=False)
        histories = random_prompts(SHAPE["vocab_size"], [load.prefix] * count, seed)
        ttft: list[float] = []
        prompt_tokens = cached_tokens = preemptions = 0
        begin = warm_begin = time.perf_counter()
        for turn in range(load.turns):
            if turn == 1:
                warm_begin = time.perf_counter()
            words = random_prompts(SHAPE["vocab_size"], [load.user] * count, 1000 * (turn + 1) + seed)
            for first in range(0, count, load.in_flight):
                group = range(first, min(first + load.in_flight, count))
                for session in group:
                    histories[session] += words[session]
                prompts: Any = [{"prompt_token_ids": list(histories[session])} for session in group]
                outputs = self.llm.generate(prompts, params, use_tqdm=False)
                for session, output in zip(group, outputs, strict=True):
                    histories[session] += output.outputs[0].token_ids
                    preemptions += output.metrics.num_preemptions
                    if turn:
                        ttft.append(output.metrics.first_token_latency)
                        prompt_tokens += len(output.prompt_token_ids)
                        cached_tokens += output.num_cached_tokens or 0
        end = time.perf_counter()
        cached = cached_tokens / prompt_tokens
        return Served(end - begin, end - warm_begin, statistics.median(ttft), cached, preemptions)


def main() -> None:
    parser = options(__doc__, rounds=2)
    parser.add_argument("--sessions", type=int, nargs="+", default=[2, 4, 5, 6, 7, 8, 9, 10, 12], metavar="N")
    parser.add_argument("--fit", type=int, default=4, help="sessions the unshared cache holds (default: %(default)s)")
    parser.add_argument("--prefix", type=int, default=896, help="tokens (default: %(default)s)")
    parser.add_argument("--user", type=int, default=32, help="tokens a turn (default: %(default)s)")
    parser.add_argument("--answer", type=int, default=16, help="tokens a turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=4, help="2 or more (default: %(default)s)")
    parser.add_argument("--in-flight", type=int, default=2, help="requests at a time (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.turns < 2:
        parser.error("--turns must be 2 or more: the first turn of a session is never warm")
    load = Load(arguments.prefix, arguments.user, arguments.answer, arguments.turns, arguments.in_flight)
    blocks = arguments.fit * load.blocks + 1  # and vLLM's null block
    memory = blocks * BLOCK * TOKEN_BYTES
    report = Report("cache_pressure", arguments, cache_bytes=memory, session_blocks=load.blocks)
    note(f"{memory / 2**20:.0f} MiB of cache: {blocks} blocks without sharing; a session grows to {load.blocks}")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        model = random_checkpoint(Path(directory) / "model", "tiny_config", **SHAPE)
        engines = _start(stack, model, load, memory, arguments.threads)
        for count in arguments.sessions:
            note(f"{count} sessions")
            turns = {name: _turns(engine, count, load) for name, engine in engines.items()}
            _tabulate(report, count, count / arguments.fit, load, interleaved(turns, arguments.rounds, notes=False))
    report.show()


def _start(stack: ExitStack, model: Path, load: Load, memory: int, threads: int) -> dict[str, Child]:
    settings = dict(
        dtype="bfloat16",
        max_model_len=load.length,
        kv_cache_memory_bytes=memory,
        block_size=BLOCK,
        disable_log_stats=False,
    )
    engines = {}
    for name, value in (("on", "1"), ("off", "0")):
        environ = engine_environ(threads) | {"HUNYUAN_VLLM_CLA_SHARING": value}
        engines[name] = stack.enter_context(Child(f"sharing {name}", Sessions, model, settings, environ=environ))
    for engine in engines.values():
        engine.ready()
        engine.call("serve", 2, load, -1)  # warms up
    return engines


def _turns(engine: Child, count: int, load: Load) -> Callable[[], Served]:
    """A callable whose n-th call serves the n-th round's sessions."""
    rounds = iter(range(10**6))
    return lambda: engine.call("serve", count, load, next(rounds))


def _tabulate(report: Report, count: int, working_set: float, load: Load, served: dict[str, list[Served]]) -> None:
    on, off = served["on"], served["off"]
    warm_tokens = count * (load.turns - 1) * (load.user + load.answer)
    report.add(
        "Sharing on against off at equal cache memory; C is the unshared cache; above 1: sharing is faster",
        sessions=count,
        working_set=f"{working_set:.2f} C",
        total_time=ratios([run.seconds for run in off], [run.seconds for run in on]),
        warm_throughput=ratios([run.warm_seconds for run in off], [run.warm_seconds for run in on]),
        warm_TTFT=ratios([run.warm_ttft for run in off], [run.warm_ttft for run in on]),
    )
    cells: dict[str, Any] = dict(sessions=count)
    for name, runs in served.items():
        cells |= {
            f"{name}:_cached": f"{statistics.median(run.cached for run in runs):.0%}",
            f"{name}:_warm_tokens/s": Spread.of(warm_tokens / run.warm_seconds for run in runs),
            f"{name}:_warm_TTFT_ms": Spread.of(1e3 * run.warm_ttft for run in runs),
            f"{name}:_preempted": sum(run.preemptions for run in runs),
        }
    report.add("With sharing on, and off: prompt tokens from the cache in warm turns, new tokens a second", **cells)


if __name__ == "__main__":
    main()
