"""Prefill and decode speed of the engine, against this machine's limits, the reference model and mlx-lm.

    python benchmarks/decode.py
    python benchmarks/decode.py --profile        # instead: the profile of a decode step

A random checkpoint of 1.1 billion parameters in bfloat16. Decode is the steps after the prompts are read. Its bound is
the time this machine needs to read the weights of a step: attention, shared MLP, the distinct experts that the batch
hits (counted) and the head, without cache and activations. The read bandwidth is measured right before and after each
run, because it varies on a shared host. Prefill is compared with this machine's bfloat16 matrix product.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import Report, Spread, checkpoint_option, interleaved, mid_checkpoint, note, options, ratios
from decode_peers import MlxPeer, Reference
from decode_profile import profile
from probe import Probe, Weights
from processes import BATCHES, Child, Engine, engine_environ, engine_settings, random_prompts

WARM_UP_IDS = 256  # any vocabulary has these
REFERENCE_TOKENS = 24  # it is slow, and its steps take the same time
MLX_LENGTHS = (8, 9)  # prompt and new tokens: it reads a few tokens a second


@dataclass(frozen=True)
class Rates:
    """One batch of one contestant."""

    prefill: float
    """Tokens a second, as is `decode`."""
    decode: float
    tokens: list[list[int]]
    """What it made, [batch][new tokens]."""
    memory: float
    """Bytes a second that the machine could read at the time: the mean of just before and just after."""

    @classmethod
    def of(cls, steps: Callable[..., Any], prompts: list[list[int]], new_tokens: int, probe: Child) -> Rates:
        """From a contestant's `steps`: the seconds of each, the first of which reads the prompts, and the tokens."""
        before = probe.call("read")
        seconds, tokens = steps(prompts, new_tokens)
        after = probe.call("read")
        read, made = sum(map(len, prompts)), len(prompts) * (len(seconds) - 1)
        memory = (max(before.values()) + max(after.values())) / 2
        return cls(read / seconds[0], made / sum(seconds[1:]), tokens, memory)


def main() -> None:
    parser = options(__doc__, rounds=6)
    checkpoint_option(parser)
    parser.add_argument("--prompt-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--mlx-python", type=Path, metavar="PATH", help="an interpreter that has mlx-lm")
    parser.add_argument("--profile", action="store_true", help="break a decode step down instead")
    arguments = parser.parse_args()
    report = Report("decode", arguments)
    model = mid_checkpoint(arguments.checkpoint)
    settings = engine_settings(arguments.prompt_tokens, arguments.new_tokens)
    if arguments.profile:
        profile(model, settings, BATCHES, arguments, report)
    else:
        compare(model, settings, arguments, report)
    report.show()


def compare(model: Path, settings: dict[str, Any], arguments: argparse.Namespace, report: Report) -> None:
    config = json.loads((model / "config.json").read_text())
    with ExitStack() as stack:
        children = _children(stack, model, settings, arguments)
        probe = children.pop("probe")
        turns: dict[str, Callable[[], Any]] = {"machine": partial(_machine_turn, probe)}
        for name, child in children.items():
            new_tokens = min(arguments.new_tokens, REFERENCE_TOKENS) if name == "reference" else arguments.new_tokens
            lengths = (arguments.prompt_tokens, new_tokens)
            turns[name] = _turns(partial(child.call, "steps"), BATCHES, lengths, config["vocab_size"], probe)
        if arguments.mlx_python:
            peer = stack.enter_context(MlxPeer(arguments.mlx_python, model))
            report.fact(mlx_lm=peer.ready())
            turns["mlx-lm"] = _turns(peer.steps, (1,), MLX_LENGTHS, config["vocab_size"], probe)
        else:
            note('mlx-lm: not installed; name an interpreter that has "mlx[cpu]" and mlx-lm with --mlx-python')
        results = interleaved(turns, arguments.rounds)
        note("counting the experts that the batches hit")
        distinct = {
            batch: children["reference"].call("distinct_experts", *_sequences(results, batch, config, arguments))
            for batch in BATCHES
        }
    machine = results.pop("machine")
    multiply = [flops for _, flops in machine]
    _tabulate(report, results, Weights.of(model), distinct, config["moe_topk"], multiply)
    for way in machine[0][0]:
        report.add("This machine", what=f"reading: {way}, GB/s", rate=Spread.of(ways[way] / 1e9 for ways, _ in machine))
    report.add("This machine", what="bfloat16 product, GFLOP/s", rate=Spread.of(flops / 1e9 for flops in multiply))


def _children(
    stack: ExitStack, model: Path, settings: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Child]:
    """The contestants and the probe, started side by side, ready and warm."""
    environ = engine_environ(arguments.threads)
    children = {
        "engine, compiled": Child("compiled", Engine, model, settings, environ=environ),
        "engine, eager": Child("eager", Engine, model, settings | {"enforce_eager": True}, environ=environ),
        "reference": Child("reference", Reference, model, environ=environ),
        "probe": Child("probe", Probe, environ=environ),
    }
    for child in children.values():
        stack.enter_context(child)
    for name, child in children.items():
        child.ready()
        if name != "probe":
            for batch in BATCHES:
                child.call("steps", random_prompts(WARM_UP_IDS, [arguments.prompt_tokens] * batch, 0), 2)
    return children


def _machine_turn(probe: Child) -> tuple[dict[str, float], float]:
    """Bytes a second of each way of reading, and operations a second."""
    return probe.call("read"), probe.call("multiply")


def _turns(
    steps: Callable[..., Any], batches: Sequence[int], lengths: tuple[int, int], vocab_size: int, probe: Child
) -> Callable[[], dict[int, Rates]]:
    """A callable whose n-th call runs every batch on the n-th round's prompts; `lengths` of prompts and answers."""
    rounds = itertools.count()
    prompt_tokens, new_tokens = lengths

    def turn() -> dict[int, Rates]:
        number, rates = next(rounds), {}
        for batch in batches:
            prompts = random_prompts(vocab_size, [prompt_tokens] * batch, 100 * number + batch)
            rates[batch] = Rates.of(steps, prompts, new_tokens, probe)
        return rates

    return turn


def _sequences(
    results: dict[str, list[Any]], batch: int, config: dict[str, Any], arguments: argparse.Namespace
) -> tuple[list[list[int]], int]:
    """The first round's prompts with what the compiled engine made of them, and the prompts' length."""
    prompts = random_prompts(config["vocab_size"], [arguments.prompt_tokens] * batch, batch)
    made = results["engine, compiled"][0][batch].tokens
    return [prompt + tokens for prompt, tokens in zip(prompts, made, strict=True)], arguments.prompt_tokens


def _tabulate(
    report: Report,
    results: dict[str, list[dict[int, Rates]]],
    weights: Weights,
    distinct: dict[int, float],
    topk: int,
    multiply: list[float],
) -> None:
    for batch in BATCHES:
        size = weights.of_step(distinct[batch])
        report.add("Weights a decode step reads", batch=batch, experts_a_layer=distinct[batch], MB=size / 1e6)
        for name, rounds in results.items():
            if batch not in rounds[0]:
                continue
            memory = [rates[batch].memory for rates in rounds]
            for phase, limit in (
                ("decode", [batch * rate / size for rate in memory]),
                ("prefill", [rate / weights.prompt_flops(topk) for rate in multiply]),
            ):
                speed = [getattr(rates[batch], phase) for rates in rounds]
                cells: dict[str, Any] = {"tokens_a_second": Spread.of(speed)}
                if phase == "decode":
                    cells["GB_a_second_readable"] = Spread.of(rate / 1e9 for rate in memory)
                cells["share_of_limit"] = ratios(speed, limit)
                for peer in ("reference", "mlx-lm"):
                    theirs = [getattr(rates[batch], phase) for rates in results.get(peer, []) if batch in rates]
                    cells[f"against_{peer}"] = ratios(speed, theirs) if theirs else "–"
                report.add(phase.capitalize(), what=name, batch=batch, **cells)
    report.fact(rounds={name: [_figures(rates) for rates in rounds] for name, rounds in results.items()})


def _figures(rates: dict[int, Rates]) -> dict[int, dict[str, float]]:
    """One round of one contestant by batch, without its tokens."""
    return {batch: dict(prefill=run.prefill, decode=run.decode, memory=run.memory) for batch, run in rates.items()}


if __name__ == "__main__":
    main()
