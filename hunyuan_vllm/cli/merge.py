"""`hunyuan-vllm merge-lora`: a checkpoint and a LoRA adapter in, one checkpoint out."""

from __future__ import annotations

import time
from pathlib import Path

import typer
from rich.console import Console

from hunyuan_vllm import demo
from hunyuan_vllm.cli.show import resumable
from hunyuan_vllm.util.errors import UserError

__all__ = ["merge_lora"]


def merge_lora(
    base_model_path: Path = typer.Option(
        ..., "--base_model_path", "--base-model-path", help="Folder of the checkpoint, or demo.", show_default=False
    ),
    adapter_model_path: Path = typer.Option(
        ..., "--adapter_model_path", "--adapter-model-path", help="Folder of the adapter.", show_default=False
    ),
    output_path: Path = typer.Option(
        ..., "--output_path", "--output-path", help="Folder to write; new, or empty.", show_default=False
    ),
    save_dtype: str = typer.Option("bf16", "--save_dtype", "--save-dtype", help="bf16, fp16 or fp32."),
    shard_size: str = typer.Option("5GB", "--shard_size", "--shard-size", help="Most bytes of a file."),
) -> None:
    """Merge a LoRA adapter into its checkpoint.

    Each weight W that the adapter changes becomes W + scale·B·A, computed in
    float32 and rounded once; all others are as they were. One tensor is in
    memory at a time. Tokenizer, generation settings and chat template come
    along. Every file is read back from the disk and compared. Work goes on in
    OUTPUT.partial: stopped at any moment, by Ctrl-C or by a power cut, the
    same command goes on where it was, and ends with the same bytes.

    \b
    Example:
      hunyuan-vllm merge-lora --base_model_path /models/hunyuan-large
          --adapter_model_path train_output/final --output_path /models/mine
      hunyuan-vllm serve /models/mine

    An adapter also serves unmerged, several on one model:
    hunyuan-vllm serve --enable-lora --lora-modules mine=train_output/final

    \b
    Exit status: 0 OUTPUT is complete, 2 something given is of no use, 3 the
    disk gave out, 130 interrupted.
    """
    from hunyuan_vllm.quantize.options import parse_size
    from hunyuan_vllm.quantize.source import Source
    from hunyuan_vllm.serving_command import checkpoint_command
    from hunyuan_vllm.train.adapter import Adapter
    from hunyuan_vllm.train.merge import SAVE_DTYPES, Merge
    from hunyuan_vllm.util.progress import Progress
    from hunyuan_vllm.util.text import gigabytes

    if save_dtype not in SAVE_DTYPES:
        raise UserError(f"--save_dtype {save_dtype}: it is {', '.join(SAVE_DTYPES)}")
    base_model_path = demo.folder(base_model_path)
    if not base_model_path.is_dir():
        raise UserError(f"--base_model_path {base_model_path} is no folder")
    progress = Progress(Console(stderr=True))
    source = Source(base_model_path)
    adapter = Adapter(adapter_model_path, source.config)
    started = time.monotonic()
    with resumable(output_path):
        merge = Merge(
            source, adapter, output_path.absolute(), SAVE_DTYPES[save_dtype], parse_size(shard_size), progress
        )
        progress.say(f"{len(adapter.changes):,} of {len(source.shapes):,} tensors change")
        merge.run()
    seconds = time.monotonic() - started
    progress.say(f"{output_path} holds {gigabytes(merge.nbytes)}, read back and compared; {seconds:,.0f} s")
    progress.say(f"serve it: {checkpoint_command(output_path)}")
