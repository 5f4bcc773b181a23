"""`hunyuan-vllm cluster`: several hosts as one; `check` looks whether they can be."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import typer
from rich.console import Console

from hunyuan_vllm.cli.show_findings import show_sections, tally
from hunyuan_vllm.errors import UserError
from hunyuan_vllm.findings import exit_status, sections_json

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Several hosts as one.")


@app.callback()
def _group() -> None:
    """Several hosts as one. SSH between them comes first: python3 deploy/login_ssh.py --help"""


@app.command()
def check(
    hosts: str = typer.Option(..., "--hosts", help="The hosts, with commas between: IPv4, IPv6 or names."),
    ssh_port: int = typer.Option(22, "--ssh-port", min=1, max=65535, help="Port of their SSH servers."),
    user: str = typer.Option(None, "--user", help="Account on every host.  [default: who runs this]"),
    model: Path = typer.Option(None, "--model", help="Checkpoint folder, at the same path on every host."),
    interface: str = typer.Option(None, "--ifname", help="Network interface that must carry each host's address."),
    gpus: int = typer.Option(None, "--gpus-per-node", min=0, help="GPUs that each host must have."),
    ports: str = typer.Option(
        "6379", "--ports", help="Ports that hosts must reach on each other, besides one that the system chooses."
    ),
    python: str = typer.Option(sys.executable, "--python", help="Python of the environment, on every host."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
    jobs: int = typer.Option(8, "--jobs", min=1, max=64, help="Hosts worked on at a time."),
    timeout: float = typer.Option(15.0, "--timeout", min=1.0, help="Seconds for each connection and command."),
) -> None:
    """Check that hosts can be one cluster. Changes nothing on them.

    Compares versions, GPUs, checkpoint files and clocks; connects from each
    host to the ports of each other; and looks at each host's GPU memory,
    shared memory, limits, disk, name and network interfaces. The hosts need
    this package at the same path, and SSH by key from here.

    \b
    Examples:
      hunyuan-vllm cluster check --hosts 10.0.0.1,10.0.0.2 --ssh-port 36000
      hunyuan-vllm cluster check --hosts node1,node2 --ifname bond1 \\
          --gpus-per-node 8 --model /models/Hunyuan-A52B-Instruct
      hunyuan-vllm cluster check --hosts node1,node2 --ports 6379,20000-20010
      hunyuan-vllm cluster check --hosts node1,node2 --json | jq .sound

    `hunyuan-vllm doctor` looks closer at one host, `hunyuan-vllm check` at a
    checkpoint.

    \b
    Exit status: 0 no problems (there may be warnings), 1 problems, 2 the
    command was wrong, 130 interrupted.
    """
    from hunyuan_vllm.cluster.check import ClusterCheck, Wanted
    from hunyuan_vllm.cluster.connection import Credentials
    from hunyuan_vllm.cluster.credentials import default_keys, this_user
    from hunyuan_vllm.cluster.hosts import parse_hosts
    from hunyuan_vllm.cluster.known_hosts import read_known_hosts
    from hunyuan_vllm.cluster.ports import parse_ports
    from hunyuan_vllm.cluster.steps import Steps

    me = this_user()
    parsed = parse_hosts(hosts, ssh_port, user if user is not None else me.pw_name, option="--hosts")
    try:
        wanted = Wanted(python, parse_ports(ports), str(model.absolute()) if model else None, interface, gpus)
    except ValueError as error:
        raise UserError(f"--ports: {error}") from None
    home = Path(me.pw_dir)
    steps = Steps(jobs, Console(stderr=True))
    run = ClusterCheck(parsed, wanted, Credentials(default_keys(home)), read_known_hosts(home), steps, timeout)
    try:
        sections = run.run()
    except KeyboardInterrupt:
        print("hunyuan-vllm: interrupted; ports held for the check are let go within a minute", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # an ordinary exit would wait for threads that wait for hosts
    status = exit_status(sections)
    if as_json:
        print(json.dumps({"sound": status == 0, "sections": sections_json(sections)}, indent=1, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        show_sections(sections, console)
        console.print(tally(sections), style="bold red" if status else "green", soft_wrap=True)
    raise typer.Exit(status)
