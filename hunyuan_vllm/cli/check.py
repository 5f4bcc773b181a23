"""`hunyuan-vllm check`: whether a checkpoint is complete and consistent"""

import os
from contextlib import nullcontext

import typer
from rich.console import Console

from hunyuan_vllm.cli.show import end_report
from hunyuan_vllm.util.progress import Progress


def check(
    path: str = typer.Argument(metavar="PATH", help="Checkpoint directory, downloaded hub repository, or demo."),
    deep: bool = typer.Option(False, "--deep", help="Read every byte: find NaN, infinity and unfilled space."),
    jobs: int = typer.Option(
        min(os.cpu_count() or 1, 8), "--jobs", min=1, help="With --deep: files read at a time.", show_default=True
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON, with every tensor by name."),
) -> None:
    """Check a checkpoint without loading it.

    Reads the config, the index, the header of every shard, all quantisation
    scales, the tokenizer, the chat template and generation_config.json, and
    lists everything that is wrong, each with its remedy. Takes seconds at any
    size; --deep takes as long as reading the checkpoint.

    \b
    Examples:
      hunyuan-vllm check /models/Hunyuan-A52B-Instruct
      hunyuan-vllm check /models/Hunyuan-A52B-Instruct --deep
          reads every byte: broken or unfinished files
      hunyuan-vllm check demo
          the model in the package
      hunyuan-vllm check /models/mine --json | jq '.sections[].findings[]'

    For hashes use sha256sum --check, or hf cache verify for what the hub has.

    \b
    Exit status: 0 sound (there may be warnings), 1 problems were found, 2
    wrong command or PATH has no checkpoint, 130 interrupted.
    """
    from hunyuan_vllm.check.files import open_directory
    from hunyuan_vllm.check.run import check_directory

    directory = open_directory(path)
    console = Console(stderr=True)
    with nullcontext() if deep else console.status("reading headers and tokenizer"):
        report = check_directory(directory, Progress(console) if deep else None, jobs)
    if not as_json:
        Console(highlight=False).print(str(directory), style="bold", soft_wrap=True, markup=False)
    total, active = report.parameters or (None, None)
    end_report(
        report.sections, as_json, path=str(directory), stored_bytes=report.stored_bytes, parameters=total,
        parameters_used_a_token=active,
    )  # fmt: skip
