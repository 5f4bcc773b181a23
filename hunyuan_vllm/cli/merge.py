"""`hunyuan-vllm merge-lora`: merge a LoRA adapter into its checkpoint"""

import time
from pathlib import Path

import typer
from rich.console import Console

from hunyuan_vllm import demo
from hunyuan_vllm.cli.show import resumable
from hunyuan_vllm.util.errors import UserError


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
    shard_size: str = typer.Option("5GB", "--shard_size", "--shard-size", help="Maximum size of a file."),
) -> None:
    """Merge a LoRA adapter into its checkpoint.

    Each changed weight W becomes W + scale·B·A, computed in float32 and rounded
    once; all others are unchanged. One tensor is in memory at a time. Tokenizer,
    generation settings and chat template are copied. Files are written to
    OUTPUT.partial, read back and compared; after an interruption the same
    command continues and produces the same bytes.

    \b
    Example:
      hunyuan-vllm merge-lora --base_model_path /models/hunyuan-large
          --adapter_model_path train_output/final --output_path /models/mine
      hunyuan-vllm serve /models/mine

    Adapters can also be served unmerged, several on one model:
    hunyuan-vllm serve --enable-lora --lora-modules mine=train_output/final

    \b
    Exit status: 0 OUTPUT is complete, 2 invalid input, 3 the disk is full or
    broken, 130 interrupted.
    """
    from hunyuan_vllm.quantize.source import Source
    from hunyuan_vllm.serving_command import checkpoint_command
    from hunyuan_vllm.train.adapter import Adapter
    from hunyuan_vllm.train.merge import SAVE_DTYPES, Merge
    from hunyuan_vllm.util.progress import Progress
    from hunyuan_vllm.util.text import gigabytes, parse_size

    if save_dtype not in SAVE_DTYPES:
        raise UserError(f"--save_dtype {save_dtype}: it is {', '.join(SAVE_DTYPES)}")
    base_model_path = demo.folder(base_model_path)
    if not base_model_path.is_dir():
        raise UserError(f"--base_model_path {base_model_path} is not a directory")
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
