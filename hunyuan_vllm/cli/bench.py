"""`hunyuan-vllm bench`: measure a running server, and compare two runs"""

import json
import os
from pathlib import Path

import typer
from rich.console import Console

from hunyuan_vllm.cli.show import show_table
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.streams import say

FAILED = 1  # exit status

app = typer.Typer(invoke_without_command=True)


@app.callback()
def bench(
    context: typer.Context,
    url: str = typer.Option(None, help="The server; default: this machine's, by HOST, LOCAL_IP, PORT."),
    key_file: Path = typer.Option(None, help="File (chmod 600) with its API key."),
    tokenizer: Path = typer.Option(
        None,
        metavar="DIRECTORY",
        help="Directory of the tokenizer; default: the server's checkpoint, if it is on this machine.",
    ),
    concurrency: str = typer.Option("1,4", metavar="N,…", help="Concurrent requests."),
    input_len: int = typer.Option(2048, min=1, help="Tokens of a prompt."),
    output_len: int = typer.Option(256, min=1, help="Tokens of an answer."),
    output: Path = typer.Option(None, metavar="FILE.json", help="Save the run for `compare`."),
) -> None:
    """Measure a running server with the published workload, or compare two runs.

    The workload of Hunyuan-Large's published rates: 2048 tokens in, 1 and 4 concurrent requests, measured by `vllm
    bench serve`. For request rates, data sets and sweeps use that, or `vllm bench sweep serve`, directly.

    \b
    Examples:
      hunyuan-vllm bench --output before.json
          the server that `hunyuan-vllm serve` started here
      hunyuan-vllm bench --url http://10.0.0.5:8020 --key-file ~/hunyuan.key
          --tokenizer /models/hunyuan-tokenizer
      hunyuan-vllm bench compare before.json after.json

    \b
    Environment variables:
      HOST, LOCAL_IP, PORT                     where the server is
      VLLM_API_KEY, HUNYUAN_VLLM_API_KEY_FILE  its key

    Exit status: 0; 1 requests failed; 2 nothing was measured; 130 interrupted, --output has the finished points.
    """
    if context.invoked_subcommand is not None:
        return
    from hunyuan_vllm import __version__
    from hunyuan_vllm.bench.client import connect, default_url, find_key
    from hunyuan_vllm.bench.run import describe, measure, run_table
    from hunyuan_vllm.plugin import installed_vllm
    from hunyuan_vllm.util.files import replacing

    steps = _positive_numbers(concurrency)
    if output and not output.absolute().parent.is_dir():
        raise UserError(f"{output} cannot be written: {output.absolute().parent} does not exist")
    url = url or default_url(os.environ)
    served = connect(url, find_key(url, key_file, os.environ))
    directory = served.tokenizer(tokenizer)
    run = describe(served, f"{__version__} ({' '.join(installed_vllm() or ('no vLLM',))})")
    notes = Console(stderr=True, highlight=False)
    error = None
    try:
        for number, step in enumerate(steps):
            notes.print(f"{number + 1} of {len(steps)}: {step} requests at a time", style="dim")
            point, problem = measure(served, directory, step, input_len, output_len, run["seed"] + number)
            error = error or problem
            run["points"].append(point)
            if output:
                with replacing(output) as temporary:
                    temporary.write_text(json.dumps(run, indent=1) + "\n")
    finally:  # the finished points of an interrupted run, too
        if run["points"]:
            show_table(run_table(run))
    if error:
        say(f"some requests failed ({error}): see the server's log")
        raise typer.Exit(FAILED)


@app.command()
def compare(
    a: Path = typer.Argument(metavar="A.json", help="The run before.", show_default=False),
    b: Path = typer.Argument(metavar="B.json", help="The run after.", show_default=False),
) -> None:
    """Compare two runs, and list what else differs: machine, versions, options.

    Exit status: 0; 2 they cannot be compared.
    """
    from hunyuan_vllm.bench.run import comparison, differences, read_run

    runs = read_run(a), read_run(b)
    show_table(comparison(*runs))
    for line in differences(*runs):
        print(f"differs: {line}")


def _positive_numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UserError(f"--concurrency {text} is not a list of positive whole numbers such as 1,4,16")
    return found
