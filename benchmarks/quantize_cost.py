"""Time and peak memory of `hunyuan-vllm quantize`, compared with what --plan says, and the plan for 389B.

    python benchmarks/quantize_cost.py

A random checkpoint with weights of 100 MB is converted to each scheme, each in its own process. Memory is the peak of
anonymous memory, sampled 50 times a second.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Report, Spread, interleaved, note, options, random_checkpoint
from processes import Child, Watch

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.quant.schemes import WRITTEN
from hunyuan_vllm.quantize.convert import Options, Plan

WIDE: dict[str, Any] = dict(
    vocab_size=8192, hidden_size=4096, intermediate_size=12288, num_hidden_layers=2, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=4096, num_experts=2, tie_word_embeddings=True,
)  # fmt: skip
PUBLISHED: dict[str, Any] = dict(
    num_experts=16, num_key_value_heads=8, use_mixed_mlp_moe=True, use_cla=True, cla_share_factor=2, use_qk_norm=True,
    rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0}, tie_word_embeddings=True,
)  # fmt: skip
SAMPLE_EVERY = 0.02  # seconds
RUNS = {scheme: dict(scheme=scheme) for scheme in WRITTEN} | {
    "int8-w8a8, smooth": dict(scheme="int8-w8a8", smooth=0.5),
}


class Converter:
    """Converts a checkpoint once, and says what it took; to be built in a `Child`."""

    def __init__(self, source: Path, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._source = source

    def convert(self, given: dict[str, Any]) -> tuple[float, int]:
        """Seconds, and bytes of anonymous memory at the peak."""
        import torch

        from hunyuan_vllm.quantize.convert import quantize_checkpoint

        documents = torch.randint(3, WIDE["vocab_size"], (given["tokens"] // 512, 512)).tolist()
        target = self._source.with_name("converted")
        with Watch(SAMPLE_EVERY) as watch:
            start = time.perf_counter()
            quantize_checkpoint(
                self._source, target, given["scheme"], calibration=documents, calibration_tokens=given["tokens"],
                smooth=given.get("smooth"), shard_bytes=500_000_000,
            )  # fmt: skip
            seconds = time.perf_counter() - start
        shutil.rmtree(target)
        return seconds, watch.peak


def _options(given: dict[str, Any]) -> Options:
    return Options(given["scheme"], given.get("smooth"), calibration_tokens=given["tokens"])


def main() -> None:
    parser = options(__doc__, rounds=2)
    parser.add_argument("--tokens", type=int, default=2048, help="calibration tokens (default: %(default)s)")
    arguments = parser.parse_args()
    report = Report("quantize_cost", arguments, shape=WIDE)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as directory:
        note("writing a random checkpoint of 1.9 GB")
        source = random_checkpoint(Path(directory) / "bf16", "tiny_config", **WIDE)
        config = HunYuanConfig.from_pretrained(source)
        environ = {"OMP_NUM_THREADS": str(arguments.threads)}

        def run(name: str) -> tuple[float, int]:
            """Seconds, and the peak of memory."""
            with Child(name, Converter, source, arguments.threads, environ=environ).ready() as child:
                return child.call("convert", RUNS[name] | {"tokens": arguments.tokens})

        measured = interleaved({name: lambda name=name: run(name) for name in RUNS}, arguments.rounds)
    size = Plan.of(config, _options(RUNS["int8"] | {"tokens": arguments.tokens})).source_bytes
    for name, rounds in measured.items():
        plan = Plan.of(config, _options(RUNS[name] | {"tokens": arguments.tokens}))
        report.add(
            f"a checkpoint of {size / 1e9:.1f} GB",
            scheme=name,
            seconds=Spread.of(seconds for seconds, _ in rounds),
            MB_a_second=Spread.of(size / 1e6 / seconds for seconds, _ in rounds),
            peak_GB=max(peak for _, peak in rounds) / 1e9,
            planned_GB=plan.memory / 1e9,
        )
    for name, given in RUNS.items():
        plan = Plan.of(HunYuanConfig(**PUBLISHED), _options(given | {"tokens": 8192}))
        report.add(
            "the published 389B network, by --plan",
            scheme=name,
            read_GB=plan.source_bytes / 1e9,
            written_GB=plan.written_bytes / 1e9,
            meanwhile_GB=plan.state_bytes / 1e9,
            memory_GB=plan.memory / 1e9,
        )
    report.show()


if __name__ == "__main__":
    main()
