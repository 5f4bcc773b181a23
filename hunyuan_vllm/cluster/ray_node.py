"""Ray on this machine: looked at, started, stopped. `python -m hunyuan_vllm.cluster.ray_node` does what its input says.

The input is JSON, because a token is in it, which no argument may hold; so is the output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from hunyuan_vllm.cluster import tls
from hunyuan_vllm.cluster.node_setup import NodeSetup
from hunyuan_vllm.cluster.processes import (
    count_raylets,
    end_processes,
    processes_on_gpus,
    ray_processes,
    raylet_of,
    shown,
    works,
)
from hunyuan_vllm.cluster.ray_start import CURRENT, NodeError, noted_setup, start, temporary
from hunyuan_vllm.doctor.hardware import read_gpus
from hunyuan_vllm.doctor.probes import System
from hunyuan_vllm.util.errors import UserError

__all__ = ["Looked", "look", "stop"]


@dataclass(frozen=True)
class Looked:
    """What a machine says of itself.

    Attributes:
        home: the user's home directory.
        interfaces: network interface → its addresses.
        gpus: how many nvidia-smi lists.
        setup: of the node that runs here, as it was noted when it started; None if none runs, or another one.
        processes: of any Ray: what they are.
        raylets: how many of those run a node; without one, the rest is leftovers.
        works: actors and tasks that run.
    """

    home: str
    interfaces: Mapping[str, list[str]]
    gpus: int
    setup: NodeSetup | None
    processes: list[str]
    raylets: int
    works: list[str]


def look(address: str) -> Looked:
    """See what there is; nothing is changed."""
    found = ray_processes()
    setup = noted_setup(address)
    if setup is not None and raylet_of(found, address, setup.gcs) is None:
        setup = None
    try:
        gpus = len(read_gpus(System()))
    except (OSError, ValueError):
        gpus = 0
    interfaces = {name: [entry.address for entry in entries] for name, entries in psutil.net_if_addrs().items()}
    texts = [shown(process) for process in found]
    return Looked(str(Path.home()), interfaces, gpus, setup, texts, count_raylets(found), works(found))


def stop() -> tuple[list[str], list[str]]:
    """End all of Ray that is this user's; what was ended, and what could not be."""
    ended, stuck = end_processes(ray_processes)
    (temporary() / CURRENT).unlink(missing_ok=True)
    return ended, stuck


def _main(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked for is under "do": look, request (a certificate), start or stop."""
    if asked["do"] == "look":
        return asdict(look(asked["address"]))
    if asked["do"] == "stop":
        ended, stuck = stop()
        return {"ended": ended, "stuck": stuck, "on_gpus": processes_on_gpus(System())}
    setup = NodeSetup.from_json(asked["setup"])
    if asked["do"] == "request":
        files = setup.tls_files
        assert files is not None
        return {"request": None if tls.has_certificate(files) else tls.request_certificate(files)}
    if asked.get("certificate") and setup.tls_files:
        tls.store_certificate(setup.tls_files, asked["certificate"], asked["authority"])
    started = time.monotonic()
    return {"said": start(setup, asked["token"]), "seconds": time.monotonic() - started}


if __name__ == "__main__":
    try:
        answer = _main(json.load(sys.stdin))
    except NodeError as error:
        answer = {"problem": error.what, "remedy": error.remedy}
    except UserError as error:
        what, _, remedy = str(error).rpartition(": ")
        answer = {"problem": what or remedy, "remedy": remedy}
    print(json.dumps(answer))
