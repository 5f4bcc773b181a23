"""Speed of the int8 schemes on a CPU, against BF16: decode and prefill, at batch 1 and 8.

    python benchmarks/int8_decode.py
    python benchmarks/int8_decode.py --profile int8     # instead: where the time of its decode steps goes

A random checkpoint of 1.1 billion parameters in bfloat16, quantised while it is loaded. Decode is the time of the steps
after the prompts are read, prefill that of the step that reads them. All engines are compiled, each has a process of
its own, and they take turns within a round.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import Report, Spread, checkpoint_option, interleaved, mid_checkpoint, options, ratios
from decode_profile import profile
from processes import Child, Engine, engine_environ, random_prompts

SCHEMES = {"bf16": None, "int8": "hunyuan_int8", "int8-w8a8": "hunyuan_int8_w8a8"}
BATCHES = (1, 8)
MIB = 2**20
Rates = dict[tuple[str, int], float]
"""Tokens a second of a phase and batch."""


def main() -> None:
    parser = options(__doc__, rounds=6)
    checkpoint_option(parser)
    parser.add_argument("--prompt-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--profile", choices=list(SCHEMES), help="break a decode step of this scheme down instead")
    arguments = parser.parse_args()
    report = Report("int8_decode", arguments)
    model = mid_checkpoint(arguments.checkpoint)
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    longest = arguments.prompt_tokens + arguments.new_tokens
    settings: dict[str, Any] = dict(
        dtype="bfloat16",
        max_model_len=longest,
        max_num_batched_tokens=max(BATCHES) * longest,  # all prompts of a batch are read in one step
        kv_cache_memory_bytes=256 * MIB,
    )
    if arguments.profile:
        profile(model, settings | {"quantization": SCHEMES[arguments.profile]}, BATCHES, arguments, report)
    else:
        _compare(model, settings, vocab_size, arguments, report)
    report.show()


def _compare(
    model: Path, settings: dict[str, Any], vocab_size: int, arguments: argparse.Namespace, report: Report
) -> None:
    def turns(child: Child) -> Callable[[], Rates]:
        rounds = itertools.count()

        def turn() -> Rates:
            number, rates = next(rounds), {}
            for batch in BATCHES:
                prompts = random_prompts(vocab_size, [arguments.prompt_tokens] * batch, 100 * number + batch)
                seconds, _ = child.call("steps", prompts, arguments.new_tokens)
                rates["prefill", batch] = batch * arguments.prompt_tokens / seconds[0]
                rates["decode", batch] = batch * (len(seconds) - 1) / sum(seconds[1:])
            return rates

        return turn

    with ExitStack() as stack:
        environ = engine_environ(arguments.threads)
        children = {
            name: stack.enter_context(Child(name, Engine, model, settings | {"quantization": scheme}, environ=environ))
            for name, scheme in SCHEMES.items()
        }
        contestants = {name: turns(child.ready()) for name, child in children.items()}
        for turn in contestants.values():
            turn()  # the first of a kind warms up
        results = interleaved(contestants, arguments.rounds)
    for phase, batch in itertools.product(("decode", "prefill"), BATCHES):
        speeds = {name: [rates[phase, batch] for rates in rounds] for name, rounds in results.items()}
        for name, speed in speeds.items():
            report.add(
                phase.capitalize(),
                what=name,
                batch=batch,
                tokens_a_second=Spread.of(speed),
                against_bf16=ratios(speed, speeds["bf16"]),
            )


if __name__ == "__main__":
    main()
