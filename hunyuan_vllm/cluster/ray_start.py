"""Starts Ray on this machine, as head or worker, where all is ready for it; and notes how, for who asks later."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from hunyuan_vllm.cluster import tls
from hunyuan_vllm.cluster.node_setup import NodeSetup
from hunyuan_vllm.cluster.ports import fixed_ports
from hunyuan_vllm.cluster.processes import end_processes, ray_processes, shown
from hunyuan_vllm.cluster.ray_token import read_token, store_token
from hunyuan_vllm.cluster.start_hook import HOOK
from hunyuan_vllm.ray_environment import NODE_FOLDER, without_secrets
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import write_private
from hunyuan_vllm.util.net import why_unreachable

__all__ = ["CURRENT", "NodeError", "START_TIMEOUT", "find_ray", "noted_setup", "start", "temporary"]

START_TIMEOUT = 90.0  # seconds; a node whose token is wrong is refused after some 30
KEPT_SESSIONS = 3  # folders with the logs of a Ray that has ended
CURRENT = "ray_current_cluster"  # where `ray start` notes the cluster that programs on this machine join


class NodeError(UserError):
    """Ray does not start here; what keeps it from that, and what to do."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}: {remedy}")
        self.what, self.remedy = what, remedy


def start(setup: NodeSetup, token: str | None = None) -> list[str]:
    """Start Ray on a machine where none runs.

    Args:
        token: the head's; None where it is in its file already.

    Returns:
        What a person may want to know: files that were changed.

    Raises:
        UserError: it cannot be started, or did not start.
    """
    find_ray()
    said = []
    file = Path(setup.token_file)
    if token is not None and store_token(file, token):
        said.append(f"the token is in {file}")
    if read_token(file) is None:
        raise NodeError(f"there is no token in {file}", _fetch(setup))
    if setup.tls_files and not tls.has_certificate(setup.tls_files):
        raise NodeError(f"there is no valid certificate in {setup.tls}", "hunyuan-vllm cluster up --tls makes them")
    _check_ports(setup)
    if not setup.is_head:
        _check_head(setup)
    _prune_sessions()
    _run_ray(setup)
    write_private(_note(setup.address), json.dumps({"setup": setup.to_json(), "environment": setup.environment()}))
    return said


def noted_setup(address: str) -> NodeSetup | None:
    """What the node at `address` was last started with here; None where no such note is to be read."""
    try:
        return NodeSetup.from_json(json.loads(_note(address).read_text())["setup"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def temporary() -> Path:
    return Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"


def find_ray() -> Path:
    """The command `ray` of this environment.

    Raises:
        NodeError: Ray is not installed.
    """
    ray = Path(sys.executable).with_name("ray")
    if not ray.exists():
        raise NodeError(f"Ray is not installed in the environment of {sys.executable}", "pip install ray")
    return ray


def _run_ray(setup: NodeSetup) -> None:
    ray = find_ray()
    own = without_secrets({name: value for name, value in os.environ.items() if not name.startswith("RAY_")})
    environ = {**own, **setup.environment(), "RAY_START_HOOK": HOOK}
    # Ray's own programs and vLLM's compilers are looked for there.
    environ["PATH"] = f"{ray.parent}:{environ.get('PATH', os.defpath)}"
    # What Ray leaves running would keep a pipe open; and it is to outlive the connection that it is started over.
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                [str(ray), *setup.ray_arguments()], env=environ, cwd="/", stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, timeout=START_TIMEOUT,
            )  # fmt: skip
            status = f"exit status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            status = f"no answer in {START_TIMEOUT:.0f} s"
        output.seek(0)
        text = output.read().decode(errors="replace")
    if status:
        end_processes(ray_processes)
        logs = temporary() / "session_latest" / "logs"
        raise NodeError(f"ray start failed ({status}), and said last: {_cause(text)}", f"see {logs} on that node")


def _cause(text: str) -> str:
    """The line of Ray's output that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "error" in line or "denied" in line]
    return (telling or lines or ["it said nothing"])[-1][:400]


def _check_ports(setup: NodeSetup) -> None:
    """Ray would start without some of them, and be half a node."""
    for number, port in fixed_ports(setup.is_head).items():
        family = socket.AF_INET6 if ":" in setup.address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((setup.address, number))
                listener.listen()
            except OSError as error:
                what = f"port {number} ({port.name}) is not to be had on {setup.address}"
                raise NodeError(f"{what}: {error.strerror}{_holder(number)}", "end what has it") from None


def _holder(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return f" by {shown(psutil.Process(connection.pid))}"
    except psutil.Error:
        pass
    return ""


def _check_head(setup: NodeSetup) -> None:
    """Ray itself would try for minutes."""
    if why := why_unreachable(setup.gcs):
        raise NodeError(f"no head answers at {setup.gcs} ({why})", "start it first, and let this node reach it")


def _fetch(setup: NodeSetup) -> str:
    if setup.is_head:
        return "the head makes one"
    file = setup.token_file
    return f"copy the head's: (umask 077; mkdir -p {Path(file).parent}; ssh {setup.head} cat {file} >{file})"


def _note(address: str) -> Path:
    return Path.home() / NODE_FOLDER / f"node-{address}.json"


def _prune_sessions() -> None:
    """Each start leaves a folder of logs behind; with no Ray running, only the newest are worth keeping."""
    sessions = sorted(temporary().glob("session_2*"), key=lambda folder: folder.name)
    for folder in sessions[:-KEPT_SESSIONS]:
        if folder.lstat().st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)
