"""Ray on this machine alone: what `ray_head.sh`, `ray_worker.sh` and `ray_stop.sh` run; `cluster up` does all hosts"""

import os
import shlex
import socket
import sys
from pathlib import Path

import typer

from hunyuan_vllm.cluster.processes import process_title, ray_processes
from hunyuan_vllm.cluster.ray_node import GCS_PORT, NodeSetup, make_token, parse_variables, token_file
from hunyuan_vllm.cluster.ray_start import find_ray, read_ray_state, start, stop
from hunyuan_vllm.envs import Settings
from hunyuan_vllm.ray_environment import NODE_DIRECTORY
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.net import family_of, interface_of, is_loopback, own_addresses, own_interfaces
from hunyuan_vllm.util.streams import say
from hunyuan_vllm.util.text import plural, some

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

ADDRESS = typer.Option(
    None, "--address", help="This node's address.  [default: LOCAL_IP, else the one towards the other nodes]"
)
INTERFACE = typer.Option(
    None, "--ifname", help="Network interface that has it.  [default: SOCKET_IFNAME, else it is found]"
)
GPUS = typer.Option(None, "--gpus", min=0, help="GPUs that Ray is told of.  [default: all there are]")
ENCRYPT = typer.Option(False, "--tls", help="Use the certificates that `hunyuan-vllm cluster up --tls` made.")
VARIABLES = typer.Option([], "--env", metavar="NAME=VALUE", help="Set a variable for Ray and all it starts.")
FORCE = typer.Option(False, "--force", help="End another Ray even if it is in use.")
DRY_RUN = typer.Option(False, "--dry-run", help="Print the exact command and environment, change nothing.")


@app.command()
def head(
    address: str = ADDRESS, interface: str = INTERFACE, gpus: int = GPUS, encrypt: bool = ENCRYPT,
    variables: list[str] = VARIABLES, force: bool = FORCE, dry_run: bool = DRY_RUN,
) -> None:  # fmt: skip
    """Start Ray on this machine as the head of a cluster. Makes the token if there is none."""
    own = address or Settings.read(os.environ).local_ip or _own_address()
    setup = _setup(own, own, interface, gpus, encrypt, variables)
    _start(setup, force, dry_run)
    if not dry_run:
        say(f"the head runs at {setup.gcs}; on each other node: sh deploy/ray_worker.sh {own}")


@app.command()
def worker(
    head_address: str = typer.Argument(..., metavar="HEAD_IP", help="The head's address."),
    address: str = ADDRESS, interface: str = INTERFACE, gpus: int = GPUS, encrypt: bool = ENCRYPT,
    variables: list[str] = VARIABLES, force: bool = FORCE, dry_run: bool = DRY_RUN,
) -> None:  # fmt: skip
    """Start Ray on this machine as a node of the cluster whose head is at HEAD_IP. Needs the head's token."""
    own = address or Settings.read(os.environ).local_ip or _address_towards(head_address)
    setup = _setup(own, head_address, interface, gpus, encrypt, variables)
    if setup.is_head:
        raise UserError(f"{head_address} is this machine: sh deploy/ray_head.sh starts the head")
    _start(setup, force, dry_run)
    if not dry_run:
        say(f"{own} joined the cluster at {setup.gcs}")


@app.command("stop")
def end(dry_run: bool = typer.Option(False, "--dry-run", help="Print what would be ended, change nothing.")) -> None:
    """End all of Ray on this machine that is this user's, including stale workers."""
    if dry_run:
        found = [process_title(process) for process in ray_processes()]
        say(f"these would be ended: {some(found)}" if found else "no Ray runs here")
        return
    ended = _stop()
    say(f"{plural(ended, 'process')} of Ray ended" if ended else "no Ray ran here")


def _stop() -> int:
    """How many processes were ended."""
    ended, stuck = stop()
    if stuck:
        raise UserError(f"these processes of Ray do not end: {some(stuck)}; reboot")
    return len(ended)


def _setup(
    own: str, head_address: str, interface: str | None, gpus: int | None, encrypt: bool, variables: list[str]
) -> NodeSetup:
    interfaces = own_interfaces()
    found = interface_of(own, interfaces)
    if found is None:
        here = sorted(address for address in own_addresses() if ":" not in address)
        raise UserError(f"{own} is not this machine's address: it has {', '.join(here)}")
    wanted = interface or Settings.read(os.environ).socket_ifname or found
    if own not in interfaces.get(wanted, ()):
        raise UserError(f"{wanted} does not have {own}: {found} does")
    home = Path.home()
    return NodeSetup(
        address=own,
        head=head_address,
        interface=wanted,
        gpus=read_ray_state(own).gpus if gpus is None else gpus,
        token_file=str(token_file(os.environ, home)),
        tls=str(home / NODE_DIRECTORY / "tls") if encrypt else None,
        variables=parse_variables(variables),
    )


def _start(setup: NodeSetup, force: bool, dry_run: bool) -> None:
    """Start Ray unless it runs as requested; with `dry_run` print the command as a line to paste into a shell."""
    old = read_ray_state(setup.address)
    if old.setup == setup:
        say(f"Ray already runs here as requested; nothing {'would be' if dry_run else 'was'} changed")
        return
    if old.raylets and old.workloads and not force:
        raise UserError(f"another Ray runs here, used by {some(old.workloads)}: stop that, or give --force")
    if dry_run:
        if old.processes:
            say(f"an earlier Ray would be ended: {some(old.processes)}")
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in setup.environment().items())
        print(f"env {variables} \\\n  ray {shlex.join(setup.ray_arguments())}")
        return
    find_ray()
    if old.processes:
        say(f"an earlier Ray was ended: {plural(_stop(), 'process')}")
    if setup.is_head:
        make_token(Path(setup.token_file))
    for line in start(setup):
        say(line)


def _own_address() -> str:
    """The only address that others could reach; if there are several, the user must choose."""
    found = sorted(address for address in own_addresses() if ":" not in address and not is_loopback(address))
    if len(found) != 1:
        has = f"has several addresses ({', '.join(found)})" if found else "has no address that others reach"
        raise UserError(f"this machine {has}: name one with LOCAL_IP=")
    return found[0]


def _address_towards(other: str) -> str:
    """The address that a connection to `other` would come from; nothing is sent."""
    try:
        with socket.socket(family_of(other), socket.SOCK_DGRAM) as probe:
            probe.connect((other, GCS_PORT))
            address: str = probe.getsockname()[0]
            return address
    except OSError as error:
        raise UserError(f"{other} cannot be reached from here ({error.strerror or error}): give its IP") from None


if __name__ == "__main__":
    try:
        app()
    except UserError as mistake:
        say(str(mistake))
        sys.exit(mistake.status)
