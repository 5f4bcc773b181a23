"""`hunyuan-vllm doctor`: problems of this machine or installation, found before a server is started on it"""

import json
import sys

import typer
from rich.console import Console

from hunyuan_vllm.cli.show import show_sections, tally
from hunyuan_vllm.util.findings import exit_status, sections_json


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
    timeout: float = typer.Option(
        18, "--timeout", min=1, help="Seconds for imports in other processes, the slowest part."
    ),
) -> None:
    """Check this machine and this installation.

    Each line is ok, a warning, a PROBLEM (with what to do), or skipped (with
    the reason). Nothing is changed, nothing is started on a GPU, and it takes
    less than 20 seconds. Run it in the folder, and with
    the environment, that the server is to be started with; on every node.

    \b
    Examples:
      hunyuan-vllm doctor
      PORT=9000 LOCAL_IP=10.0.0.5 hunyuan-vllm doctor
          with the variables that `serve` will be given
      hunyuan-vllm doctor --timeout 120
          if packages are on a slow disk and read for the first time
      hunyuan-vllm doctor --json | jq -r '.sections[].findings[] | select(.status == "problem") | .remedy'

    \b
    Exit status: 0 no problems (there may be warnings), 1 problems, 2 the
    command was wrong, 130 interrupted.
    """
    from hunyuan_vllm.doctor.probes import System
    from hunyuan_vllm.doctor.run import examine

    try:
        with Console(stderr=True).status("checking, and starting a worker process"):
            sections = examine(System(timeout=timeout))
    except KeyboardInterrupt:
        print("hunyuan-vllm: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    status = exit_status(sections)
    if as_json:
        print(json.dumps({"sound": status == 0, "sections": sections_json(sections)}, indent=1, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        show_sections(sections, console)
        console.print(tally(sections), style="bold red" if status else "green", soft_wrap=True)
    raise typer.Exit(status)
