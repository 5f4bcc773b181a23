"""Speed of the int8 schemes on a CPU, against BF16: decode and prefill, at batch 1 and 8.

    python benchmarks/int8_decode.py
    python benchmarks/int8_decode.py --model hunyuan-1.8b
    python benchmarks/int8_decode.py --profile int8     # instead: the profile of its decode steps

A random checkpoint in bfloat16, quantised at load time. Prefill is the first step, which
reads the prompts; decode is the steps after it. All engines are compiled, run in their own processes and are
interleaved.
"""

from __future__ import annotations

import argparse
import itertools
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import MODELS, Report, Spread, interleaved, kept_checkpoint, options, ratios
from decode_profile import profile
from processes import BATCHES, Child, Engine, engine_environ, engine_settings, measured_rates

SCHEMES = {"bf16": None, "int8": "hunyuan_int8", "int8-w8a8": "hunyuan_int8_w8a8"}


def main() -> None:
    parser = options(__doc__, rounds=6)
    parser.add_argument(
        "--model", choices=list(MODELS), default="1.1b", help="its shape (default: %(default)s); see common.MODELS"
    )
    parser.add_argument("--prompt-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--profile", choices=list(SCHEMES), help="break a decode step of this scheme down instead")
    arguments = parser.parse_args()
    report = Report("int8_decode", arguments)
    model = kept_checkpoint(arguments.model)
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    settings = engine_settings(arguments.prompt_tokens, arguments.new_tokens)
    if arguments.profile:
        profile(model, settings | {"quantization": SCHEMES[arguments.profile]}, BATCHES, arguments, report)
    else:
        _compare(model, settings, vocab_size, arguments, report)
    report.show()


def _compare(
    model: Path, settings: dict[str, Any], vocab_size: int, arguments: argparse.Namespace, report: Report
) -> None:
    with ExitStack() as stack:
        environ = engine_environ(arguments.threads)
        children = {
            name: stack.enter_context(Child(name, Engine, model, settings | {"quantization": scheme}, environ=environ))
            for name, scheme in SCHEMES.items()
        }
        lengths = (arguments.prompt_tokens, arguments.new_tokens)
        contestants = {name: measured_rates(child.ready(), vocab_size, *lengths) for name, child in children.items()}
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
