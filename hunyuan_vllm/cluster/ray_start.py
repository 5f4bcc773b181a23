"""Ray on this machine: read, started as head or worker, stopped

`python -m hunyuan_vllm.cluster.ray_start` does what its standard input says. Its input and output are JSON, because
the token must not be an argument.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hunyuan_vllm.cluster import tls
from hunyuan_vllm.cluster.hosts import HostError
from hunyuan_vllm.cluster.processes import (
    count_raylets,
    end_processes,
    has_raylet,
    process_title,
    processes_on_gpus,
    ray_processes,
    session_processes,
    workloads,
)
from hunyuan_vllm.cluster.ray_node import HOOK, NodeSetup, fixed_ports, read_token
from hunyuan_vllm.doctor.hardware import read_gpus
from hunyuan_vllm.doctor.probes import System
from hunyuan_vllm.ray_environment import NODE_DIRECTORY, current_cluster_file, without_secrets
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import write_private
from hunyuan_vllm.util.net import family_of, listener, own_interfaces, why_unreachable

START_TIMEOUT = 90.0  # seconds; a node whose token is wrong is refused after some 30
KEPT_SESSIONS = 3  # directories with the logs of earlier runs of Ray


@dataclass(frozen=True)
class RayState:
    """What a machine has, and what runs of Ray there.

    Attributes:
        gpus: how many nvidia-smi lists.
        setup: of the node that runs here, as recorded when it started; None if none runs, or another one.
        raylets: how many of those run a node; with none, the rest is left over.
    """

    home: str
    interfaces: dict[str, tuple[str, ...]]
    gpus: int
    setup: NodeSetup | None
    processes: list[str]
    raylets: int
    workloads: list[str]


def read_ray_state(address: str) -> RayState:
    """What runs of Ray on this machine, whose address in the cluster is `address`."""
    found = ray_processes()
    setup = _recorded_setup(address)
    if setup is not None and not has_raylet(found, address, setup.gcs):
        setup = None
    try:
        gpus = len(read_gpus(System()))
    except (OSError, ValueError):
        gpus = 0
    titles = [process_title(process) for process in found]
    return RayState(str(Path.home()), own_interfaces(), gpus, setup, titles, count_raylets(found), workloads(found))


def stop() -> tuple[list[str], list[str]]:
    """End all of Ray that is this user's; the processes that ended, and those that did not."""
    ended, stuck = end_processes(ray_processes)
    current_cluster_file().unlink(missing_ok=True)
    return ended, stuck


def start(setup: NodeSetup, token: str | None = None) -> list[str]:
    """Start Ray on a machine where none runs.

    Args:
        token: the head's; None where it is in its file already.

    Returns:
        Files that were changed, a line each.
    """
    find_ray()
    said = []
    file = Path(setup.token_file)
    if token is not None and write_private(file, token):
        said.append(f"the token is in {file}")
    if read_token(file) is None:
        copy = f"(umask 077; mkdir -p {file.parent}; ssh {setup.head} cat {file} >{file})"
        remedy = "the head makes one" if setup.is_head else f"copy the head's: {copy}"
        raise HostError(f"there is no token in {file}", remedy)
    if setup.tls_files and not tls.has_certificate(setup.tls_files):
        raise HostError(f"there is no valid certificate in {setup.tls}", "hunyuan-vllm cluster up --tls makes them")
    _check_ports(setup)
    # Ray itself would try for minutes.
    if not setup.is_head and (why := why_unreachable(setup.gcs)):
        raise HostError(f"no head answers at {setup.gcs} ({why})", "start it first, and let this node reach it")
    _prune_sessions()
    run_ray(setup)
    record = {"setup": asdict(setup), "environment": setup.environment()}
    write_private(_record_file(setup.address), json.dumps(record))
    return said


def find_ray() -> Path:
    """The command `ray` of this environment."""
    ray = Path(sys.executable).with_name("ray")
    if not ray.exists():
        raise HostError(f"Ray is not installed in the environment of {sys.executable}", "pip install ray")
    return ray


def run_ray(setup: NodeSetup) -> None:
    """Run `ray start`. If it fails or is interrupted, all processes that it started are ended."""
    ray = find_ray()
    own = without_secrets({name: value for name, value in os.environ.items() if not name.startswith("RAY_")})
    environ = {**own, **setup.environment(), "RAY_START_HOOK": HOOK}
    # Ray looks for its own programs there, and vLLM for compilers.
    environ["PATH"] = f"{ray.parent}:{environ.get('PATH', os.defpath)}"
    # Not a pipe, which Ray's daemons would hold open; a session of its own, so that Ray outlives this connection.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [str(ray), *setup.ray_arguments()], env=environ, cwd="/", stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        failure = "it was interrupted"
        try:
            status = process.wait(START_TIMEOUT)
            failure = f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            failure = f"no answer in {START_TIMEOUT:.0f} s"
        finally:
            if failure:
                end_processes(lambda: [*session_processes(process.pid), *ray_processes()])
                process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    if failure:
        logs = current_cluster_file().parent / "session_latest" / "logs"
        raise HostError(f"ray start failed ({failure}); its last message: {_cause(text)}", f"see {logs} on that node")


def _recorded_setup(address: str) -> NodeSetup | None:
    """What the node at `address` was last started with on this machine."""
    try:
        return NodeSetup(**json.loads(_record_file(address).read_text())["setup"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _record_file(address: str) -> Path:
    return Path.home() / NODE_DIRECTORY / f"node-{address}.json"


def _cause(text: str) -> str:
    """The line of Ray's output that gives the reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "error" in line or "denied" in line]
    return (telling or lines or ["none"])[-1][:400]


def _check_ports(setup: NodeSetup) -> None:
    """Without some of them Ray would start and not work."""
    for number, port in fixed_ports(setup.is_head).items():
        with socket.socket(family_of(setup.address), socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((setup.address, number))
                probe.listen()
            except OSError as error:
                holder = listener(number)
                by = f" by {process_title(holder)}" if holder else ""
                text = f"port {number} ({port.name}) is unavailable on {setup.address}: {error.strerror}{by}"
                raise HostError(text, "end the program that uses it") from None


def _prune_sessions() -> None:
    """Each start leaves a directory of logs behind; with no Ray running, keep only the newest."""
    sessions = sorted(current_cluster_file().parent.glob("session_2*"), key=lambda directory: directory.name)
    for directory in sessions[:-KEPT_SESSIONS]:
        if directory.lstat().st_uid == os.getuid():
            shutil.rmtree(directory, ignore_errors=True)


def _main(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request is under "do": state, certificate, start or stop."""
    if request["do"] == "state":
        return asdict(read_ray_state(request["address"]))
    if request["do"] == "stop":
        ended, stuck = stop()
        return {"ended": ended, "stuck": stuck, "on_gpus": processes_on_gpus(System())}
    setup = NodeSetup(**request["setup"])
    if request["do"] == "certificate":
        files = setup.tls_files
        assert files is not None
        return {"request": None if tls.has_certificate(files) else tls.request_certificate(files)}
    if request.get("certificate") and setup.tls_files:
        tls.store_certificate(setup.tls_files, request["certificate"], request["authority"])
    started = time.monotonic()
    return {"said": start(setup, request["token"]), "seconds": time.monotonic() - started}


if __name__ == "__main__":
    try:
        answer = _main(json.load(sys.stdin))
    except HostError as error:
        answer = {"problem": error.text, "remedy": error.remedy}
    except UserError as error:
        text, _, remedy = str(error).rpartition(": ")
        answer = {"problem": text or remedy, "remedy": remedy}
    print(json.dumps(answer))
