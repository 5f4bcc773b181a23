"""The nodes of a run: which they are, whether they are alike, and the processes on each"""

import atexit
import hashlib
import json
import logging
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.machine import installed_version
from hunyuan_vllm.util.net import INTERFACE_VARIABLES, interface_of, normalise_address, own_addresses, own_interfaces
from hunyuan_vllm.util.text import differences, some

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class NodeOfRun:
    """One node: its address, and one process for each of its GPUs."""

    address: str
    processes: int


def read_nodes(
    environ: Mapping[str, str], count_gpus: Callable[[], int], own: Collection[str] | None = None
) -> tuple[list[NodeOfRun], int]:
    """The nodes, this one first, and the port at which their processes meet.

    HOST_GPU_NUM is how many processes a node has (default: its GPUs, at least one); NODE_IP_LIST, "ip1:8,ip2:8", the
    nodes and how many each has; LOCAL_IP, which of them this one is (default: the one with an address of this machine);
    NODES and NODE_NUM, of nodes and of processes in all, are only checked; MASTER_PORT is the port.

    Args:
        own: this machine's addresses; default: looked up.
    """
    each = _number(environ, "HOST_GPU_NUM")
    port = _number(environ, "MASTER_PORT") or DEFAULT_PORT
    words = [word for word in environ.get("NODE_IP_LIST", "").replace(",", " ").split() if word]
    nodes = [_node(word, each) for word in words]
    addresses = [node.address for node in nodes]
    if len(set(addresses)) < len(addresses):
        raise UserError(f"NODE_IP_LIST={environ['NODE_IP_LIST']} names a node twice")
    if len(nodes) > 1:
        nodes.insert(0, nodes.pop(_place_of_this(environ, addresses, own)))
    elif not nodes:
        nodes = [NodeOfRun("127.0.0.1", each or max(count_gpus(), 1))]
    for name, counted in (("NODES", len(nodes)), ("NODE_NUM", sum(node.processes for node in nodes))):
        said = _number(environ, name)
        if said is not None and said != counted and (words or said != 1):
            raise UserError(f"{name}={said}, and NODE_IP_LIST has {counted}: make them agree, or unset {name}")
    return nodes, port


def _node(word: str, each: int | None) -> NodeOfRun:
    address, colon, slots = word.rpartition(":")
    if not colon or not slots.isdigit() or not 1 <= int(slots) <= 64:
        raise UserError(f"NODE_IP_LIST: {word} is not ADDRESS:GPUS, such as 10.0.0.1:8")
    if each is not None and each != int(slots):
        raise UserError(f"HOST_GPU_NUM={each}, and NODE_IP_LIST says {word}: make them agree, or unset HOST_GPU_NUM")
    return NodeOfRun(normalise_address(address), int(slots))


def _place_of_this(environ: Mapping[str, str], addresses: list[str], own: Collection[str] | None) -> int:
    if local := environ.get("LOCAL_IP", "").strip():
        if normalise_address(local) not in addresses:
            raise UserError(f"LOCAL_IP={local} is not in NODE_IP_LIST ({', '.join(addresses)})")
        return addresses.index(normalise_address(local))
    have = own_addresses() if own is None else own
    for place, address in enumerate(addresses):
        if address in have:
            return place
    raise UserError("no node of NODE_IP_LIST has an address of this machine: set LOCAL_IP to this node's")


def _number(environ: Mapping[str, str], name: str) -> int | None:
    raw = environ.get(name, "").strip()
    if not raw:
        return None
    if not raw.isdigit() or int(raw) < 1:
        raise UserError(f"{name}={raw} is not a number of at least 1")
    return int(raw)


PACKAGES: Final = ("torch", "transformers", "accelerate", "peft", "deepspeed", "tokenizers")
EDGE: Final = 1 << 20  # bytes read at each end of a file of weights
ABSENT: Final = "absent"


def facts(paths: Sequence[str]) -> dict[str, str]:
    """What must agree on all nodes: name → a short text. `paths` are files and directories of checkpoints."""
    found = {"Python": platform.python_version()}
    found |= {name: installed_version(name) or ABSENT for name in PACKAGES}
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        found[f"hunyuan_vllm/{file.relative_to(package)}"] = _digest(file)
    for path in map(Path, paths):
        if path.is_dir():
            files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
            found |= {str(file): _digest(file) for file in files}
        else:
            found[str(path)] = _digest(path)
    return found


def compare(nodes: Mapping[str, Mapping[str, str]]) -> None:
    names = sorted({name for known in nodes.values() for name in known})
    found = {name: differences({node: known.get(name, ABSENT) for node, known in nodes.items()}) for name in names}
    differing = [name for name in names if found[name]]
    if differing:
        rest = f" (also {some(differing[1:])})" if len(differing) > 1 else ""
        raise UserError(
            f"the nodes differ: {differing[0]} is {found[differing[0]]}{rest}: bring the same checkout, environment, "
            "checkpoint and data to each, at the same paths"
        )


def _digest(file: Path) -> str:
    """Size and part of a SHA-256 of a file; of a large file of weights, only both ends are read."""
    try:
        size = file.stat().st_size
        sha = hashlib.sha256()
        with file.open("rb") as content:
            if file.suffix == ".safetensors" and size > 2 * EDGE:
                sha.update(content.read(EDGE))
                content.seek(-EDGE, 2)
                sha.update(content.read(EDGE))
            else:
                while chunk := content.read(1 << 22):
                    sha.update(chunk)
    except OSError:
        return ABSENT
    return f"{size} bytes {sha.hexdigest()[:12]}"


def torchrun_arguments(order: dict[str, Any]) -> list[str]:
    address, port = order["master"]
    where = ["--standalone", "--local-addr=127.0.0.1"]  # on a free port
    if order["nodes"] > 1:
        where = [f"--nnodes={order['nodes']}", f"--node-rank={order['rank']}"]
        where += [f"--master-addr={address}", f"--master-port={port}"]
    return [*where, f"--nproc-per-node={order['processes']}", "-m", "hunyuan_vllm.train", *order["flags"]]


def torchrun_variables(order: dict[str, Any], interface: str | None) -> dict[str, str]:
    """The environment variables of `torchrun`; between nodes, the processes communicate over `interface`."""
    # PyTorch warns of each connection whose peer has no host name.
    variables = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **order["variables"]}
    if order["nodes"] > 1 and interface is not None:
        variables = dict.fromkeys(INTERFACE_VARIABLES, interface) | variables
    return variables


def main() -> int:
    """Execute the order on standard input; returns the exit status of the first process that failed."""
    line = _read_line()
    if not line:
        return 1  # the launcher has exited
    order = json.loads(line)
    os.chdir(order["directory"])
    if order["do"] == "facts":
        print(json.dumps(facts(order["paths"])))
        return 0
    os.environ.update(torchrun_variables(order, order["interface"] or interface_of(order["address"], own_interfaces())))
    threading.Thread(target=_end_with_input, daemon=True).start()
    return _torchrun(torchrun_arguments(order))


def _read_line() -> bytes:
    """A line of standard input, read without a buffer, whose lock `_end_with_input` would hold at exit."""
    line = b""
    while not line.endswith(b"\n") and (more := os.read(0, 65536)):
        line += more
    return line


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _torchrun(arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # The process that failed has reported why; torchrun's own messages add nothing.
    logging.disable(logging.CRITICAL)
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        failed = error.get_first_failure()[1].exitcode
        return failed if failed > 0 else 128 - failed
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def end_process(status: int) -> NoReturn:
    """Exit with this status after the atexit functions, but without Python's own finalisation.

    The threads of PyTorch's process groups outlive the groups (DistributedDataParallel keeps them). One that needs
    Python during finalisation aborts the process: exit status 134 of a successful run.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    end_process(main())
