"""`hunyuan-vllm cluster`"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from hunyuan_vllm.cli.show import end_report, show_sections
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.streams import say
from hunyuan_vllm.util.text import some

if TYPE_CHECKING:
    from hunyuan_vllm.cluster.connections import Connections
    from hunyuan_vllm.cluster.hosts import Host


@contextmanager
def connected(
    hosts: str | Sequence[Host],
    ssh_port: int,
    user: str | None,
    python: str,
    jobs: int,
    timeout: float,
    quiet: bool = False,
) -> Iterator[Connections]:
    """Log in to the hosts, which are an operator's list or recorded."""
    from hunyuan_vllm.cluster.connections import Connections, Steps
    from hunyuan_vllm.cluster.credentials import default_keys, this_user
    from hunyuan_vllm.cluster.host_keys import read_known_hosts
    from hunyuan_vllm.cluster.hosts import parse_hosts
    from hunyuan_vllm.cluster.ssh import Credentials

    me = this_user()
    home = Path(me.pw_dir)
    if isinstance(hosts, str):
        hosts = parse_hosts(hosts, ssh_port, user if user is not None else me.pw_name, option="--hosts")
    steps = Steps(jobs, Console(stderr=True, quiet=quiet))
    credentials = Credentials(default_keys(home))
    connections = Connections(hosts, credentials, read_known_hosts(home), steps, timeout, python)
    try:
        connections.open()
        yield connections
    except KeyboardInterrupt:
        say("interrupted; what was started on a host may take a minute or two to end there")
        sys.stderr.flush()
        os._exit(130)  # a normal exit would wait for threads that wait for hosts
    finally:
        connections.close()


app = typer.Typer(no_args_is_help=True, help="Combine several hosts into one Ray cluster.")

HOSTS = typer.Option(..., "--hosts", help="The hosts, separated by commas: IPv4, IPv6 or names.")
SSH_PORT = typer.Option(22, "--ssh-port", min=1, max=65535, help="Port of their SSH servers.")
USER = typer.Option(None, "--user", show_default="the current user", help="Account on every host.")
MODEL = typer.Option(None, "--model", help="Checkpoint directory, at the same path on every host.")
INTERFACE = typer.Option(None, "--ifname", help="Network interface that must carry each host's address.")
PYTHON = typer.Option(
    sys.executable, "--python", show_default="the one that runs this", help="Python of the environment, on every host."
)
AS_JSON = typer.Option(False, "--json", help="Print the report as JSON.")
JOBS = typer.Option(8, "--jobs", min=1, max=64, help="Hosts processed at a time.")
TIMEOUT = typer.Option(15.0, "--timeout", min=1.0, help="Time limit in seconds for each connection and quick command.")


@app.callback()
def _group() -> None:
    """Several hosts as one. SSH between them comes first: python3 deploy/login_ssh.py --help"""


@app.command()
def check(
    hosts: str = HOSTS,
    ssh_port: int = SSH_PORT,
    user: str = USER,
    model: Path = MODEL,
    interface: str = INTERFACE,
    gpus: int = typer.Option(None, "--gpus-per-node", min=0, help="GPUs that each host must have."),
    python: str = PYTHON,
    as_json: bool = AS_JSON,
    jobs: int = JOBS,
    timeout: float = TIMEOUT,
) -> None:
    """Check that hosts can form one cluster. Changes nothing on them.

    Compares versions, GPUs, checkpoint files and clocks; connects from each
    host to Ray's ports on each other; and checks each host's GPU memory,
    shared memory, limits, disk, name and network interfaces. The hosts need
    this package at the same path, and SSH by key from here.

    \b
    Examples:
      hunyuan-vllm cluster check --hosts 10.0.0.1,10.0.0.2 --ssh-port 36000
      hunyuan-vllm cluster check --hosts node1,node2 --ifname bond1 \\
          --gpus-per-node 8 --model /models/Hunyuan-A52B-Instruct
      hunyuan-vllm cluster check --hosts node1,node2 --json | jq .sound

    `hunyuan-vllm doctor` checks one host in more detail, `hunyuan-vllm check` a
    checkpoint.

    \b
    Exit status: 0 no problems (there may be warnings), 1 problems, 2
    wrong options, 130 interrupted.
    """
    from hunyuan_vllm.cluster.check import ClusterCheck

    directory = str(model.absolute()) if model else None
    with connected(hosts, ssh_port, user, python, jobs, timeout) as connections:
        sections = ClusterCheck(connections, directory, interface, gpus).run()
    end_report(sections, as_json)


@app.command()
def up(
    hosts: str = HOSTS,
    ssh_port: int = SSH_PORT,
    user: str = USER,
    model: Path = MODEL,
    interface: str = INTERFACE,
    gpus: int = typer.Option(None, "--gpus-per-node", min=0, show_default="all it has", help="GPUs of each host."),
    logical_gpus: bool = typer.Option(
        False, "--logical-gpus", help="Let Ray count GPUs that hosts do not have, to try things out."
    ),
    encrypt: bool = typer.Option(False, "--tls", help="Encrypt the connections between Ray's processes."),
    variables: list[str] = typer.Option(
        [], "--env", metavar="NAME=VALUE", help="Set a variable for Ray and all it starts, such as NCCL_IB_HCA."
    ),
    force: bool = typer.Option(False, "--force", help="End another Ray even if it is in use."),
    python: str = PYTHON,
    as_json: bool = AS_JSON,
    jobs: int = JOBS,
    timeout: float = TIMEOUT,
) -> None:
    """Start one Ray cluster on several hosts. Run it on the head, one of the hosts.

    Checks them first, as `cluster check` does, and starts nothing if that
    finds a problem. An earlier Ray is ended, one that already runs as requested
    is left alone, and a host that dropped out is added again.

    \b
    Examples:
      hunyuan-vllm cluster up --hosts 10.0.0.1,10.0.0.2 --ssh-port 36000
      hunyuan-vllm cluster up --hosts node1,node2 --ifname bond1 \\
          --gpus-per-node 8 --model /models/Hunyuan-A52B-Instruct
      hunyuan-vllm cluster up --hosts node1,node2 --tls \\
          --env NCCL_IB_HCA=mlx5 --env NCCL_IB_GID_INDEX=3

    The first start creates the token that is needed to join: ~/.ray/auth_token
    on every host, or the file that RAY_AUTH_TOKEN_PATH names.
    `hunyuan-vllm serve` on the head then uses the GPUs of all hosts.

    \b
    Exit status: 0 the cluster is complete, 1 it is not, 2 wrong options,
    130 interrupted.
    """
    from hunyuan_vllm.cluster.credentials import this_user
    from hunyuan_vllm.cluster.ray_node import TOKEN_VARIABLE, parse_variables, token_file
    from hunyuan_vllm.cluster.status import record_cluster
    from hunyuan_vllm.cluster.up import Up

    if logical_gpus and gpus is None:
        raise UserError("--logical-gpus: give their number with --gpus-per-node")
    home = Path(this_user().pw_dir)
    directory = str(model.absolute()) if model else None
    token = str(token_file(os.environ, home)) if os.environ.get(TOKEN_VARIABLE) else None
    ray_variables = parse_variables(variables)
    with connected(hosts, ssh_port, user, python, jobs, timeout) as connections:
        run = Up(
            connections, home, model=directory, interface=interface, gpus=gpus, logical_gpus=logical_gpus,
            token_file=token, encrypt=encrypt, variables=ray_variables, force=force,
        )  # fmt: skip
        run.run()
        if all(host.setup for host in connections.hosts) and (run.changed or run.ok):
            record_cluster(connections.hosts, python, home)
    end_report(run.sections, as_json, changed=run.changed)


@app.command()
def status(as_json: bool = AS_JSON, jobs: int = JOBS, timeout: float = TIMEOUT) -> None:
    """Show the cluster that was started from here: hosts, GPUs, what is missing.

    \b
    Exit status: 0 it is complete, 1 something is missing, 2 no cluster,
    130 interrupted.
    """
    from hunyuan_vllm.cluster.status import read_status

    hosts, python = _recorded()
    with connected(hosts, 0, None, python, jobs, timeout, quiet=True) as connections:
        found = read_status(connections)
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        table = Table("host", "interface", "state", "GPUs", "free", "runs")
        for node in found["nodes"]:
            name = f"{node['host']} (head)" if node["head"] else node["host"]
            gpus, runs = f"{node['gpus']} of {node['gpus_wanted']}", some(node["works"]) or "nothing"
            table.add_row(name, node["interface"], node["state"], gpus, str(node["free_gpus"]), runs)
        console.print(table)
        show_sections([Section("Missing", [problem for host in hosts for problem in host.problems])], console)
    raise typer.Exit(0 if found["whole"] else 1)


@app.command()
def down(
    hosts: str = typer.Option(
        None, "--hosts", show_default="those of the cluster started from here", help="The hosts."
    ),
    ssh_port: int = SSH_PORT,
    user: str = USER,
    python: str = PYTHON,
    as_json: bool = AS_JSON,
    jobs: int = JOBS,
    timeout: float = TIMEOUT,
) -> None:
    """End Ray on every host, and everything that it started.

    Ends only this user's processes, including stale workers. A server that uses the
    cluster ends too: stop it first to let its requests finish.

    \b
    Examples:
      hunyuan-vllm cluster down
      hunyuan-vllm cluster down --hosts 10.0.0.1,10.0.0.2 --ssh-port 36000

    \b
    Exit status: 0 nothing runs any more, 1 a host was not reached or a process
    did not end, 2 wrong options, 130 interrupted.
    """
    from hunyuan_vllm.cluster.up import bring_down

    named: str | Sequence[Host] = hosts
    if hosts is None:
        named, python = _recorded()
    with connected(named, ssh_port, user, python, jobs, timeout) as connections:
        section = bring_down(connections)
    end_report([section], as_json)


def _recorded() -> tuple[list[Host], str]:
    from hunyuan_vllm.cluster.credentials import this_user
    from hunyuan_vllm.cluster.status import recorded_cluster

    record = recorded_cluster(Path(this_user().pw_dir))
    if record is None:
        raise UserError("no cluster was started from here: hunyuan-vllm cluster up --hosts …, or name --hosts")
    return record
