"""`hunyuan-vllm doctor`: what is wrong with this machine or this installation, before a server is started on it."""

from __future__ import annotations

import json
import sys

import typer
from rich.console import Console

from hunyuan_vllm.cli.show import show_sections, tally
from hunyuan_vllm.util.findings import exit_status, sections_json

__all__ = ["doctor"]

INTERRUPTED = 130


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
    timeout: float = typer.Option(
        18, "--timeout", min=1, help="Seconds for imports in other processes, the slowest part."
    ),
) -> None:
    """Look at this machine and this installation.

    Each line is ok, a warning, a PROBLEM (with what to do), or skipped (with
    why it could not be looked at). Nothing is changed, nothing is started on a
    GPU, and it is over in less than 20 seconds. Run it in the folder, and with
    the environment, that the server is to be started with; on every node.

    \b
    Examples:
      hunyuan-vllm doctor
      PORT=9000 LOCAL_IP=10.0.0.5 hunyuan-vllm doctor
          with the variables that `serve` will be given
      hunyuan-vllm doctor --timeout 120
          where packages lie on a slow disk and are read for the first time
      hunyuan-vllm doctor --json | jq -r '.sections[].findings[] | select(.status == "problem") | .remedy'

    \b
    Exit status: 0 no problems (there may be warnings), 1 problems, 2 the
    command was wrong, 130 interrupted.
    """
    from hunyuan_vllm.doctor.probes import System
    from hunyuan_vllm.doctor.run import examine

    try:
        with Console(stderr=True).status("looking around, and starting a worker process"):
            sections = examine(System(timeout=timeout))
    except KeyboardInterrupt:
        print("hunyuan-vllm: interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    status = exit_status(sections)
    if as_json:
        print(json.dumps({"sound": status == 0, "sections": sections_json(sections)}, indent=1, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        show_sections(sections, console)
        console.print(tally(sections), style="bold red" if status else "green", soft_wrap=True)
    raise typer.Exit(status)
