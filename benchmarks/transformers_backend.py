"""Speed of the native V1 model against vLLM's Transformers backend, on the same weights: decode and prefill.

    python benchmarks/transformers_backend.py
    python benchmarks/transformers_backend.py --models dense
    python benchmarks/transformers_backend.py --share --models moe dense 1.1b
                                    # instead: native decode as a share of the memory bandwidth

Random checkpoints in bfloat16: "moe" is a small Hunyuan-A13B (64 experts, top-8, 0.46 billion parameters), "dense" has
0.25 billion; the last two have the shapes of published models; "1.1b", for --share only, is the small Hunyuan-Large
that the other benchmarks use. Each engine runs in its own process and is compiled as by vLLM's defaults (which do not
compile the Transformers backend where RoPE is dynamic, as here); runs are interleaved. Prefill is the first step, which
reads the prompts; decode is the steps after it. Before measuring, both score the same prompts: the log-probabilities
must agree within bfloat16's rounding.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import MODELS, Report, Spread, interleaved, kept_checkpoint, options, ratios
from probe import Probe, Weights
from processes import (
    BATCHES,
    Child,
    Engine,
    Rates,
    engine_environ,
    engine_settings,
    measured_rates,
    random_prompts,
)

IMPLEMENTATIONS = {"native": "auto", "transformers": "transformers"}
# Mean difference of log-probabilities. bfloat16 moves those of a random network of this depth by 0.23 (0.22 with the
# routes of float32), so that two runs are about 0.3 apart; a mistake in the network moves them by more than 2. In
# float32 the two agree to 1e-5 (4 layers).
TOLERANCE = 0.6


class ScoringEngine(Engine):
    """An engine that also scores."""

    def score(self, prompts: Sequence[list[int]]) -> list[float]:
        """Log-probability of each token of the prompts but the first."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [
            by_token[token].logprob
            for prompt, output in zip(prompts, outputs, strict=True)
            for token, by_token in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        ]


def main() -> None:
    parser = options(__doc__, rounds=4)
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=["moe", "dense"], help="default: moe dense"
    )
    parser.add_argument("--prompt-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=32, help="default: %(default)s")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU time, for a busy machine; only fair with --threads 1"
    )
    parser.add_argument("--eager", action="store_true", help="compile neither")
    parser.add_argument("--share", action="store_true", help="compare native decode with the memory bandwidth instead")
    arguments = parser.parse_args()
    if "1.1b" in arguments.models and not arguments.share:
        parser.error("--models 1.1b: the Transformers backend has no such model; it is for --share")
    report = Report("transformers_backend", arguments)
    for name in arguments.models:
        model = kept_checkpoint(name)
        if arguments.share:
            _share(name, model, arguments, report)
        else:
            _compare(name, model, arguments, report)
    report.show()


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = engine_settings(arguments.prompt_tokens, arguments.new_tokens)
    return settings | dict(enable_prefix_caching=False, enforce_eager=arguments.eager)


def _turns(child: Child, vocab_size: int, arguments: argparse.Namespace) -> Callable[[], Rates]:
    for batch in BATCHES:  # warms up
        child.call("steps", random_prompts(vocab_size, [16] * batch, 0), 2)
    return measured_rates(child, vocab_size, arguments.prompt_tokens, arguments.new_tokens)


def _compare(name: str, model: Path, arguments: argparse.Namespace, report: Report) -> None:
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    environ = engine_environ(arguments.threads)
    with ExitStack() as stack:
        children: dict[str, Child] = {}
        for key, model_impl in IMPLEMENTATIONS.items():
            settings = _settings(arguments) | {"model_impl": model_impl}
            child = Child(f"{name} {key}", ScoringEngine, model, settings, arguments.cpu_time, environ=environ)
            children[key] = stack.enter_context(child)
        for child in children.values():
            child.ready()
        prompts = random_prompts(vocab_size, [64, 17], 7)
        scores = [child.call("score", prompts) for child in children.values()]
        difference = sum(abs(a - b) for a, b in zip(*scores, strict=True)) / len(scores[0])
        if not difference < TOLERANCE:
            raise SystemExit(f"{name}: the log-probabilities differ by {difference:.3g} on average")
        contestants = {key: _turns(child, vocab_size, arguments) for key, child in children.items()}
        results = interleaved(contestants, arguments.rounds)
    report.fact(**{f"{name}_difference": difference})
    for phase, batch in itertools.product(("decode", "prefill"), BATCHES):
        speeds = {key: [rates[phase, batch] for rates in rounds] for key, rounds in results.items()}
        report.add(
            f"{name}, tokens a second; log-probabilities differ by {difference:.3f} on average",
            phase=phase,
            batch=batch,
            **{key: Spread.of(speed) for key, speed in speeds.items()},
            ratio=ratios(speeds["native"], speeds["transformers"]),
        )


def _share(name: str, model: Path, arguments: argparse.Namespace, report: Report) -> None:
    config = json.loads((model / "config.json").read_text())
    environ = engine_environ(arguments.threads)
    with (
        Child(f"{name} native", Engine, model, _settings(arguments), arguments.cpu_time, environ=environ) as engine,
        Child("probe", Probe, environ=environ) as probe,
    ):
        engine.ready(), probe.ready()
        turn = _turns(engine, config["vocab_size"], arguments)
        results = interleaved({"probe": lambda: probe.call("read"), "native": turn}, arguments.rounds)
    memory = [max(ways.values()) for ways in results["probe"]]
    weights, experts = Weights.of(model), config.get("num_experts", 1)
    for batch in BATCHES:
        # Experts that random routes of the batch's tokens hit.
        topk = config["moe_topk"] if experts > 1 else 0
        topk = topk[0] if isinstance(topk, list) else topk
        distinct = experts * (1 - (1 - topk / experts) ** batch)
        size = weights.of_step(distinct if experts > 1 else 0)
        speed = [rates["decode", batch] for rates in results["native"]]
        report.add(
            f"{name}: decode against reading the weights",
            batch=batch,
            MB_a_step=size / 1e6,
            tokens_a_second=Spread.of(speed),
            GB_a_second_readable=Spread.of(rate / 1e9 for rate in memory),
            share_of_bound=ratios(speed, [batch * rate / size for rate in memory]),
        )


if __name__ == "__main__":
    main()
