"""`hunyuan-vllm check`: whether a checkpoint is complete and consistent"""

import json
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from hunyuan_vllm.cli.show import show_sections, tally
from hunyuan_vllm.util.findings import exit_status, sections_json
from hunyuan_vllm.util.progress import Progress

if TYPE_CHECKING:
    from hunyuan_vllm.check.run import Report


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
    if as_json:
        print(json.dumps(_json(report), indent=1, ensure_ascii=False))
    else:
        _show(report)
    raise typer.Exit(exit_status(report.sections))


def _show(report: "Report") -> None:
    console = Console(highlight=False)
    console.print(str(report.directory), style="bold", soft_wrap=True, markup=False)
    show_sections(report.sections, console)
    result = "sound" if report.sound else "NOT sound"
    console.print(f"{result}: {tally(report.sections)}", style="green" if report.sound else "bold red", soft_wrap=True)
    if report.parameters is not None:
        console.print(
            f"To see which GPUs can serve it: hunyuan-vllm plan --model {report.directory}",
            soft_wrap=True,
            markup=False,
        )


def _json(report: "Report") -> dict[str, object]:
    total, active = report.parameters or (None, None)
    return {
        "path": str(report.directory),
        "sound": report.sound,
        "stored_bytes": report.stored_bytes,
        "parameters": total,
        "parameters_used_a_token": active,
        "sections": sections_json(report.sections),
    }
