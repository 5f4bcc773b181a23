"""How fast `hunyuan-vllm merge-lora` is against a plain copy of the same checkpoint, and how much memory it takes.

    python benchmarks/merge.py

The copy is what `cp` does, and then waits until the bytes are on the disk; merging does so too, reads each file back
from the disk and compares it. The adapter is on attention (rank 64), as it is by default. Memory is the peak of
anonymous memory (what is mapped from files can be dropped at any time), beyond what the process has before.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import torch
from common import Report, Spread, checkpoint_option, interleaved, mid_checkpoint, note, options, ratios
from safetensors.torch import save_file

from hunyuan_vllm.quantize.source import Source
from hunyuan_vllm.train.merge import SAVE_DTYPES, Adapter, Merge

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_adapter(folder: Path, source: Source, rank: int) -> Path:
    """Random matrices on every attention projection, as PEFT saves them."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in source.shapes.items():
        if name.split(".")[-2] in ATTENTION:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, shape[1], generator=generator).bfloat16()
            tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], rank, generator=generator).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ATTENTION, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def copy(source: Path, target: Path) -> float:
    """Seconds of a copy that is on the disk."""
    start = time.perf_counter()
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as written:
            os.fsync(written.fileno())
            os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def merge(source: Path, adapter: Path, target: Path, shard_bytes: int) -> tuple[float, int]:
    """Seconds, and bytes of memory at the peak."""
    before = anonymous_bytes()
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        opened = Source(source)
        Merge(opened, Adapter(adapter, opened.config), target, SAVE_DTYPES["bf16"], shard_bytes).run()
    finally:
        done.set()
        watcher.join()
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds, peak[0] - before


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def main() -> None:
    parser = options(__doc__, rounds=4)
    checkpoint_option(parser)
    parser.add_argument("--rank", type=int, default=64, help="of the adapter (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for what is written (default: beside the checkpoint)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkpoint = mid_checkpoint(arguments.checkpoint)
    report = Report("merge", arguments)
    work = (arguments.work or checkpoint.parent) / f"merge-{os.getpid()}"
    work.mkdir(parents=True)
    try:
        source = Source(checkpoint)
        adapter = write_adapter(work / "adapter", source, arguments.rank)
        size = sum(map(source.nbytes, source.shapes))
        largest = max(map(source.nbytes, source.shapes))
        note(f"{size / 1e9:.2f} GB, the largest tensor {largest / 1e6:.0f} MB")
        # The first takes the source into the page cache. Memory is its, since a process keeps what it once had.
        _, memory = merge(checkpoint, adapter, work / "first", 500_000_000)
        measured = interleaved(
            {
                "copy": lambda: copy(checkpoint, work / "copied"),
                "merge": lambda: merge(checkpoint, adapter, work / "merged", 500_000_000)[0],
            },
            arguments.rounds,
        )
        for name, seconds in measured.items():
            report.add(
                f"a checkpoint of {size / 1e9:.2f} GB",
                what=name,
                seconds=Spread.of(seconds),
                MB_a_second=Spread.of(size / 1e6 / one for one in seconds),
                of_the_copy=ratios(measured["copy"], seconds),
                memory_MB=memory / 1e6 if name == "merge" else "-",
                largest_tensor_MB=largest / 1e6,
            )
    finally:
        shutil.rmtree(work)
    report.show()


if __name__ == "__main__":
    main()
