"""How long `hunyuan-vllm check` takes: headers and scales of the 389B checkpoint, and --deep against bare tools.

    python benchmarks/check.py

Headers: files of the published shape and size whose data are holes, so that they take no disk; what is timed is a whole
run of the command, tokenizer aside. Every scale is read (all are zero, and reported), as of a real checkpoint.
--deep: one thread over a 2.2 GB checkpoint in the page cache, its hash and its values, against sha256sum alone and
against only reading. CPU time, which bears a busy machine; a ratio is taken within a round.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Report, Spread, checkpoint_option, interleaved, mid_checkpoint, options, ratios

from hunyuan_vllm.check.deep import read_through
from hunyuan_vllm.checkpoint import ITEM_BYTES, read_shards
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.quant.formats import PLAIN
from hunyuan_vllm.quant.quantization_config import describe, stored_format

PUBLISHED: dict[str, Any] = dict(
    architectures=["HunYuanForCausalLM"], torch_dtype="bfloat16", tie_word_embeddings=True, num_key_value_heads=8,
    num_experts=16, moe_topk=1, use_mixed_mlp_moe=True, use_cla=True, cla_share_factor=2, use_qk_norm=True,
    rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
)  # fmt: skip
FORMATS: dict[str, dict[str, Any] | None] = {
    "BF16": None,
    "FP8": {"quant_method": "fp8", "activation_scheme": "static"},
    "int8": describe(PLAIN),
}
SHARD_BYTES = 10e9


def hollow_checkpoint(folder: Path, quantization: dict[str, Any] | None) -> Path:
    """Shards with true headers and no data behind them, their index and config; returns the folder, which is made."""
    config = HunYuanConfig(**PUBLISHED)
    layout = stored_format(quantization).layout(config)
    shards: list[dict[str, Any]] = [{}]
    end = 0
    for name, shape in layout.expected.items():
        kind = layout.types(name)[0]
        kind = "F32" if name.endswith(("_scale", "gate.wg.weight")) else kind
        size = math.prod(shape) * ITEM_BYTES[kind]
        if end + size > SHARD_BYTES:
            shards.append({})
            end = 0
        shards[-1][name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    folder.mkdir()
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        header = json.dumps(tensors).encode()
        with file.open("wb") as target:
            target.write(len(header).to_bytes(8, "little") + header)
            target.truncate(target.tell() + max(entry["data_offsets"][1] for entry in tensors.values()))
        weight_map |= dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    extra = {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps(PUBLISHED | {"model_type": "hunyuan"} | extra))
    return folder


def command_seconds(folder: Path) -> tuple[float, float]:
    """Elapsed and CPU seconds of a whole run of the command."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    code = "from hunyuan_vllm.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, "check", folder], stdout=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begin, cpu


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of `work` in this process and in those it starts."""
    begin = _cpu()
    work()
    return _cpu() - begin


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    parser = options(__doc__, rounds=4, threads=False)
    checkpoint_option(parser)
    arguments = parser.parse_args()
    report = Report("check", arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: hollow_checkpoint(Path(scratch, name), form) for name, form in FORMATS.items()}
        runs = interleaved(
            {name: lambda folder=folder: command_seconds(folder) for name, folder in folders.items()}, arguments.rounds
        )
        for name, folder in folders.items():
            shards = read_shards(sorted(folder.glob("*.safetensors")))
            report.add(
                "Headers and scales of 389B parameters",
                format=name,
                shards=len(shards),
                GB=sum(shard.size for shard in shards) / 1e9,
                tensors=sum(len(shard.tensors) for shard in shards),
                seconds=Spread.of(elapsed for elapsed, _ in runs[name]),
                CPU_seconds=Spread.of(cpu for _, cpu in runs[name]),
            )
    _deep(mid_checkpoint(arguments.checkpoint), arguments.rounds, report)
    report.show()


def _deep(folder: Path, rounds: int, report: Report) -> None:
    shards = read_shards(sorted(folder.glob("*.safetensors")))
    files = [shard.file for shard in shards]

    def read(scan: bool, digest: bool) -> None:
        for shard in shards:
            hashers = [hashlib.sha256()] if digest else []
            read_through(shard.file, shard.tensors if scan else (), hashers, lambda size: None)

    runs = interleaved(
        {
            "read only": lambda: cpu_seconds(lambda: read(False, False)),
            "values": lambda: cpu_seconds(lambda: read(True, False)),
            "values and hash": lambda: cpu_seconds(lambda: read(True, True)),
            "sha256sum": lambda: cpu_seconds(lambda: subprocess.run(["sha256sum", *files], capture_output=True)),
        },
        rounds,
    )
    size = sum(shard.size for shard in shards) / 1e9
    for name, seconds in runs.items():
        report.add(
            "--deep, one thread, page cache",
            work=name,
            GB_a_CPU_second=Spread.of(size / value for value in seconds),
            times_as_fast_as_sha256sum=ratios(runs["sha256sum"], seconds),
        )


if __name__ == "__main__":
    main()
