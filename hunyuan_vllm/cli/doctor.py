"""`hunyuan-vllm doctor`: problems of this machine or installation, found before a server is started on it"""

import typer
from rich.console import Console

from hunyuan_vllm.cli.show import end_report


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
    timeout: float = typer.Option(18, "--timeout", min=1, help="Time limit in seconds for imports in other processes."),
) -> None:
    """Check this machine and this installation.

    Each line is ok, a warning, a PROBLEM (with what to do), or skipped (with
    the reason). Nothing is changed, nothing is started on a GPU, and it takes
    less than 20 seconds. Run it on every node, in the
    directory and with the environment of the server.

    \b
    Examples:
      hunyuan-vllm doctor
      PORT=9000 LOCAL_IP=10.0.0.5 hunyuan-vllm doctor
          with the variables that `serve` will be given
      hunyuan-vllm doctor --timeout 120
          if packages are on a slow disk and read for the first time
      hunyuan-vllm doctor --json | jq -r '.sections[].findings[] | select(.status == "problem") | .remedy'

    \b
    Exit status: 0 no problems (there may be warnings), 1 problems, 2
    wrong options, 130 interrupted.
    """
    from hunyuan_vllm.doctor.probes import System
    from hunyuan_vllm.doctor.run import examine

    with Console(stderr=True).status("checking, and starting a worker process"):
        sections = examine(System(timeout=timeout))
    end_report(sections, as_json)
