"""`hunyuan-vllm bench`: how fast a running server is, and whether it became faster."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import typer
from rich.console import Console

from hunyuan_vllm.errors import UserError

__all__ = ["app"]

FAILED, INTERRUPTED = 1, 130  # exit statuses
SERVER, LOAD, OUTPUT = "The server", "What is asked", "Output"

app = typer.Typer(invoke_without_command=True)


@app.callback()
def bench(
    context: typer.Context,
    url: str = typer.Option(None, help="Default: this machine's, by HOST, LOCAL_IP, PORT.", rich_help_panel=SERVER),
    model: str = typer.Option(None, help="A model of the server; default: its first.", rich_help_panel=SERVER),
    key_file: Path = typer.Option(None, help="File (chmod 600) with its API key.", rich_help_panel=SERVER),
    ca: Path = typer.Option(None, help="PEM file with the authority of its certificate.", rich_help_panel=SERVER),
    tokenizer: Path = typer.Option(
        None, metavar="FOLDER", help="Default: its checkpoint, if that is here.", rich_help_panel=SERVER
    ),
    machine: str = typer.Option(
        None, metavar="NAME", help="What it runs on; default: what it says.", rich_help_panel=SERVER
    ),
    concurrency: str = typer.Option("1,4", metavar="N,…", help="Requests at a time.", rich_help_panel=LOAD),
    rate: str = typer.Option(None, metavar="R,…", help="Or: requests a second.", rich_help_panel=LOAD),
    input_len: str = typer.Option("2048", metavar="N,…", help="Tokens of a prompt.", rich_help_panel=LOAD),
    output_len: str = typer.Option("256", metavar="N,…", help="Tokens of an answer.", rich_help_panel=LOAD),
    requests: int = typer.Option(
        None, min=1, help="A point; default: 4 for each at a time or 30 s, at least 8.", rich_help_panel=LOAD
    ),
    warm: bool = typer.Option(True, "--warm-up/--no-warm-up", help="A few requests first.", rich_help_panel=LOAD),
    seed: int = typer.Option(
        None, min=1, help="Of the prompts; default: new ones, which no cache knows.", rich_help_panel=LOAD
    ),
    output: Path = typer.Option(None, metavar="FILE.json", help="For `compare`.", rich_help_panel=OUTPUT),
    png: Path = typer.Option(None, help="The sweep as a picture.", rich_help_panel=OUTPUT),
    chart: bool = typer.Option(False, "--chart", help="The sweep as bars.", rich_help_panel=OUTPUT),
    published: bool = typer.Option(False, "--published", help="With the published rates.", rich_help_panel=OUTPUT),
    as_json: bool = typer.Option(False, "--json", help="What --output has, instead of tables.", rich_help_panel=OUTPUT),
) -> None:
    """Measure a running server with vLLM's own benchmark (`vllm bench serve`), or compare two runs.

    Without options: the published workload, 2048 tokens in, 1 and 4 requests at a time. Lists make a sweep, of every
    combination. Prompts are random tokens; answers end at their length.

    \b
    Examples:
      hunyuan-vllm bench --output before.json
          the server that `hunyuan-vllm serve` started here
      hunyuan-vllm bench --concurrency 1,2,4,8,16,32 --png sweep.png --chart
      hunyuan-vllm bench --rate 0.5,1,2 --input-len 512,2048 --output-len 128
      hunyuan-vllm bench --url http://10.0.0.5:8020 --key-file ~/hunyuan.key
          --tokenizer /models/hunyuan-tokenizer --published
      hunyuan-vllm bench compare before.json after.json

    \b
    Environment variables:
      HOST, LOCAL_IP, PORT, VLLM_API_KEY, HUNYUAN_VLLM_API_KEY_FILE
          where the server is and its key, as for `chat`

    Exit status: 0; 1 requests failed; 2 nothing was measured; 130 interrupted: --output has the points that were done.
    """
    if context.invoked_subcommand is not None:
        return
    from hunyuan_vllm.bench.load import prepare
    from hunyuan_vllm.bench.measure import measure
    from hunyuan_vllm.bench.picture import need_matplotlib, save_png
    from hunyuan_vllm.bench.report import bars, described, published_table, run_table
    from hunyuan_vllm.bench.result import Run
    from hunyuan_vllm.bench.target import look
    from hunyuan_vllm.bench.workload import check_fits, points, positive_numbers
    from hunyuan_vllm.chat.access import checked_url, default_url, find_key, is_this_machine
    from hunyuan_vllm.chat.client import Client
    from hunyuan_vllm.chat.terminal import choose

    rates = positive_numbers("--rate", rate, whole=False) if rate else []
    lists = {"--concurrency": concurrency, "--input-len": input_len, "--output-len": output_len}
    numbers = [positive_numbers(option, text) for option, text in lists.items()]
    wanted = points(numbers[0], rates, numbers[1], numbers[2], requests)
    for file in filter(None, (output, png)):
        if not file.absolute().parent.is_dir():
            raise UserError(f"{file} cannot be written: there is no folder {file.absolute().parent}")
    if png:
        need_matplotlib()
    url = checked_url(url) if url else default_url(os.environ)
    key = find_key(url, key_file, os.environ)
    client = Client(url, key, ca)
    chosen = choose(client.models(), model)
    check_fits(wanted, chosen.context)
    target = look(client, chosen, tokenizer, machine)
    run = Run(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        model=chosen.name,
        client={"version": _version(), "place": "the server's machine" if is_this_machine(url) else "another machine"},
        machine=target.machine,
        options=target.options,
        seed=seed or int.from_bytes(os.urandom(3)) + 1,
        points=[],
    )
    notes = Console(stderr=True, highlight=False)
    notes.print(described(run))
    error, interrupted = None, False
    try:
        prepare(key, ca)
        error = measure(run, target, wanted, warm, output, notes)
    except KeyboardInterrupt:
        interrupted = True
    if run.points:
        if as_json:
            print(run.model_dump_json(indent=1))
        else:
            console = _console()
            console.print(run_table(run))
            if chart:
                console.print(bars(run))
            if published:
                console.print(published_table(run.points))
        if png:
            save_png(run, png)
    if interrupted:
        print("hunyuan-vllm: interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)
    if failed := sum(one.failed for one in run.points):
        asked = sum(one.requests for one in run.points)
        print(f"hunyuan-vllm: {failed} of {asked} requests failed ({error}): see the server's log", file=sys.stderr)
        raise typer.Exit(FAILED)


@app.command()
def compare(
    a: Path = typer.Argument(metavar="A.json", help="The run before.", show_default=False),
    b: Path = typer.Argument(metavar="B.json", help="The run after.", show_default=False),
    other_machine: bool = typer.Option(False, "--other-machine", help="Though it was another machine, or unknown."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of the table."),
) -> None:
    """Compare two runs of the same machine, and say what else differs.

    \b
    Examples:
      hunyuan-vllm bench compare before.json after.json
      hunyuan-vllm bench compare h20.json h200.json --other-machine

    Exit status: 0; 2 they are not to be compared.
    """
    from hunyuan_vllm.bench.compare import alone, check_machines, comparison, differences, pairs
    from hunyuan_vllm.bench.result import read_run

    runs = read_run(a), read_run(b)
    if not other_machine:
        check_machines(*runs, (a, b))
    found, differ = pairs(*runs), differences(*runs)
    if as_json:
        points = [{"a": one.model_dump(), "b": other.model_dump()} for one, other in found]
        print(json.dumps({"differs": differ, "points": points}, indent=1))
        return
    console = _console()
    console.print(comparison(found))
    for line in differ:
        console.print(f"differs: {line}")
    for name, one in (("A", alone(*runs)), ("B", alone(*runs[::-1]))):
        for measured in one:
            console.print(f"only in {name}: {measured.point}")


def _version() -> str:
    from hunyuan_vllm import __version__
    from hunyuan_vllm.compat import installed_version

    return f"{__version__} ({' '.join(installed_version() or ('no vLLM',))})"


def _console() -> Console:
    """As wide as it has to be where that is a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=200, highlight=False)
