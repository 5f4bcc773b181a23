"""`hunyuan-vllm cluster`"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from hunyuan_vllm.cli.show import show_sections, tally
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Section, exit_status, sections_json

if TYPE_CHECKING:
    from hunyuan_vllm.cluster.hosts import Host
    from hunyuan_vllm.cluster.logins import Logins
    from hunyuan_vllm.cluster.record import ClusterRecord


@dataclass(frozen=True)
class Run:
    """The hosts, as they were named; the connections to them; and the home of who runs this."""

    hosts: Sequence[Host]
    logins: Logins
    home: Path


@contextmanager
def cluster_run(
    hosts: str | Sequence[Host],
    ssh_port: int,
    user: str | None,
    python: str,
    jobs: int,
    timeout: float,
    quiet: bool = False,
) -> Iterator[Run]:
    """Log in to the hosts, which are an operator's list or known already.

    Raises:
        UserError: the list cannot be meant.
    """
    from hunyuan_vllm.cluster.credentials import default_keys, this_user
    from hunyuan_vllm.cluster.host_keys import read_known_hosts
    from hunyuan_vllm.cluster.hosts import parse_hosts
    from hunyuan_vllm.cluster.logins import Logins, Steps
    from hunyuan_vllm.cluster.ssh import Credentials

    me = this_user()
    home = Path(me.pw_dir)
    if isinstance(hosts, str):
        hosts = parse_hosts(hosts, ssh_port, user if user is not None else me.pw_name, option="--hosts")
    steps = Steps(jobs, Console(stderr=True, quiet=quiet))
    logins = Logins(hosts, Credentials(default_keys(home)), read_known_hosts(home), steps, timeout, python)
    try:
        logins.open()
        yield Run(hosts, logins, home)
    except KeyboardInterrupt:
        print(
            "hunyuan-vllm: interrupted; what was begun on a host may end there within a minute or two", file=sys.stderr
        )
        sys.stderr.flush()
        os._exit(130)  # an ordinary exit would wait for threads that wait for hosts
    finally:
        logins.close()


app = typer.Typer(no_args_is_help=True, help="Several hosts as one.")

HOSTS = typer.Option(..., "--hosts", help="The hosts, with commas between: IPv4, IPv6 or names.")
SSH_PORT = typer.Option(22, "--ssh-port", min=1, max=65535, help="Port of their SSH servers.")
USER = typer.Option(None, "--user", show_default="who runs this", help="Account on every host.")
MODEL = typer.Option(None, "--model", help="Checkpoint folder, at the same path on every host.")
INTERFACE = typer.Option(None, "--ifname", help="Network interface that must carry each host's address.")
PYTHON = typer.Option(
    sys.executable, "--python", show_default="the one that runs this", help="Python of the environment, on every host."
)
AS_JSON = typer.Option(False, "--json", help="Print the report as JSON.")
JOBS = typer.Option(8, "--jobs", min=1, max=64, help="Hosts worked on at a time.")
TIMEOUT = typer.Option(15.0, "--timeout", min=1.0, help="Seconds for each connection and quick command.")


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
    ports: str = typer.Option(
        None,
        "--ports",
        show_default="Ray's",
        help="Ports that hosts must reach on each other, besides one that the system chooses.",
    ),
    python: str = PYTHON,
    as_json: bool = AS_JSON,
    jobs: int = JOBS,
    timeout: float = TIMEOUT,
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
    from hunyuan_vllm.cluster.ports import checked_ports, parse_ports

    try:
        wanted_ports = checked_ports() if ports is None else parse_ports(ports)
    except ValueError as error:
        raise UserError(f"--ports: {error}") from None
    wanted = Wanted(wanted_ports, str(model.absolute()) if model else None, interface, gpus)
    with cluster_run(hosts, ssh_port, user, python, jobs, timeout) as run:
        sections = ClusterCheck(run.logins, wanted).run()
    _end(sections, as_json)


@app.command()
def up(
    hosts: str = HOSTS,
    ssh_port: int = SSH_PORT,
    user: str = USER,
    model: Path = MODEL,
    interface: str = INTERFACE,
    gpus: int = typer.Option(None, "--gpus-per-node", min=0, show_default="all it has", help="GPUs of each host."),
    logical_gpus: bool = typer.Option(
        False, "--logical-gpus", help="Let Ray count GPUs that hosts do not have: to try things out without any."
    ),
    encrypt: bool = typer.Option(False, "--tls", help="Encrypt what Ray's processes say to each other."),
    variables: list[str] = typer.Option(
        [], "--env", metavar="NAME=VALUE", help="Set a variable for Ray and all it starts, such as NCCL_IB_HCA."
    ),
    accept_warnings: bool = typer.Option(False, "--despite-warnings", help="Go on where the check only warns."),
    force: bool = typer.Option(False, "--force", help="End another Ray even while something runs on it."),
    python: str = PYTHON,
    as_json: bool = AS_JSON,
    jobs: int = JOBS,
    timeout: float = TIMEOUT,
) -> None:
    """Make hosts one Ray cluster. Run it on the head, one of the hosts.

    Checks them first, as `cluster check` does, and starts nothing where that
    finds a problem. A Ray from before is ended, one that runs as asked for is
    left alone, and a host that dropped out is taken in again.

    \b
    Examples:
      hunyuan-vllm cluster up --hosts 10.0.0.1,10.0.0.2 --ssh-port 36000
      hunyuan-vllm cluster up --hosts node1,node2 --ifname bond1 \\
          --gpus-per-node 8 --model /models/Hunyuan-A52B-Instruct
      hunyuan-vllm cluster up --hosts node1,node2 --tls \\
          --env NCCL_IB_HCA=mlx5 --env NCCL_IB_GID_INDEX=3

    Whoever joins needs the token, which the first start makes: it is in
    ~/.ray/auth_token, or where RAY_AUTH_TOKEN_PATH says, on every host.
    `hunyuan-vllm serve` on the head then uses the GPUs of all hosts.

    \b
    Exit status: 0 the cluster is whole, 1 it is not, 2 the command was wrong,
    130 interrupted.
    """
    import os

    from hunyuan_vllm.cluster.check import Wanted
    from hunyuan_vllm.cluster.node_setup import parse_variables
    from hunyuan_vllm.cluster.ports import checked_ports
    from hunyuan_vllm.cluster.ray_token import PATH_VARIABLE, token_file
    from hunyuan_vllm.cluster.record import ClusterRecord
    from hunyuan_vllm.cluster.up import Plan, Up

    if logical_gpus and gpus is None:
        raise UserError("--logical-gpus: say how many with --gpus-per-node")
    extra = parse_variables(variables)
    counted = None if logical_gpus else gpus
    with cluster_run(hosts, ssh_port, user, python, jobs, timeout) as run:
        plan = Plan(
            check=Wanted(checked_ports(), str(model.absolute()) if model else None, interface, counted),
            gpus=gpus,
            token_file=str(token_file(os.environ, run.home)) if os.environ.get(PATH_VARIABLE) else None,
            encrypt=encrypt,
            variables=extra,
            accept_warnings=accept_warnings,
            force=force,
        )
        bringing = Up(run.logins, plan, run.home)
        bringing.run()
        if bringing.setups and (bringing.changed or bringing.ok):
            setups = tuple(bringing.setups[login.address] for login in run.logins.all)
            ClusterRecord(tuple(run.hosts), setups, python).write(run.home)
    _end(bringing.sections, as_json, changed=bringing.changed)


@app.command()
def status(as_json: bool = AS_JSON, jobs: int = JOBS, timeout: float = TIMEOUT) -> None:
    """Show the cluster that was brought up from here: hosts, GPUs, what is missing.

    \b
    Exit status: 0 it is whole, 1 something is missing, 2 there is none,
    130 interrupted.
    """
    from hunyuan_vllm.cluster.status import look_at_cluster

    record = _noted()
    with cluster_run(record.hosts, 0, None, record.python, jobs, timeout, quiet=True) as run:
        found = look_at_cluster(record, run.logins)
    if as_json:
        print(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        console.print(found.table())
        section = Section("Missing")
        for node in found.nodes:
            for problem in node.problems:
                section.problem(node.name, problem.what, problem.remedy)
        show_sections([section], console)
    raise typer.Exit(0 if found.whole else 1)


@app.command()
def down(
    hosts: str = typer.Option(None, "--hosts", show_default="those that were brought up from here", help="The hosts."),
    ssh_port: int = SSH_PORT,
    user: str = USER,
    python: str = PYTHON,
    as_json: bool = AS_JSON,
    jobs: int = JOBS,
    timeout: float = TIMEOUT,
) -> None:
    """End Ray on every host, with all that runs on it; nothing keeps running or holds GPU memory.

    Of this user, also what is left of a Ray that died. A server that uses the
    cluster ends too: stop it first to let its requests finish.

    \b
    Examples:
      hunyuan-vllm cluster down
      hunyuan-vllm cluster down --hosts 10.0.0.1,10.0.0.2 --ssh-port 36000

    \b
    Exit status: 0 nothing runs any more, 1 a host was not reached or did not
    let go, 2 the command was wrong, 130 interrupted.
    """
    from hunyuan_vllm.cluster.up import bring_down

    record = _noted() if hosts is None else None
    named = record.hosts if record else hosts
    with cluster_run(named, ssh_port, user, record.python if record else python, jobs, timeout) as run:
        section = bring_down(run.logins)
    _end([section], as_json)


def _noted() -> ClusterRecord:
    from hunyuan_vllm.cluster.credentials import this_user
    from hunyuan_vllm.cluster.record import ClusterRecord

    record = ClusterRecord.read(Path(this_user().pw_dir))
    if record is None:
        raise UserError("no cluster was brought up from here: hunyuan-vllm cluster up --hosts …, or name --hosts")
    return record


def _end(sections: Sequence[Section], as_json: bool, **more: bool) -> None:
    """Print the report, and exit with its status."""
    code = exit_status(sections)
    if as_json:
        report = {"sound": code == 0, **more, "sections": sections_json(sections)}
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        show_sections(sections, console)
        console.print(tally(sections), style="bold red" if code else "green", soft_wrap=True)
    raise typer.Exit(code)
