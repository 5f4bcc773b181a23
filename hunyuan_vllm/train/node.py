"""One node of a run, told by JSON on standard input: what it has, or its processes, which end when that input does.

`train/launch.py` starts `python -m hunyuan_vllm.train.node` on each node, over SSH on all but its own.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from typing import Any

from hunyuan_vllm.server.network import READERS
from hunyuan_vllm.train.ending import end_process
from hunyuan_vllm.train.nodes import carrying
from hunyuan_vllm.train.same import facts

__all__ = ["main", "torchrun_arguments", "torchrun_variables"]


def torchrun_arguments(order: dict[str, Any]) -> list[str]:
    """What follows `torchrun`."""
    address, port = order["master"]
    return [
        f"--nnodes={order['nodes']}", f"--node-rank={order['rank']}", f"--nproc-per-node={order['processes']}",
        f"--master-addr={address}", f"--master-port={port}", "-m", "hunyuan_vllm.train", *order["flags"],
    ]  # fmt: skip


def torchrun_variables(order: dict[str, Any], interface: str | None) -> dict[str, str]:
    """The variables it is started with; between nodes, `interface` is what the processes talk over."""
    # PyTorch warns of each connection whose other end has no name.
    variables = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **order["variables"]}
    if order["nodes"] > 1 and interface is not None:
        variables = dict.fromkeys(READERS, interface) | variables
    return variables


def main() -> int:
    """Read an order, and do it; the exit status is that of the first process that failed."""
    line = _read_line()
    if not line:
        return 1  # whoever was to tell us is gone
    order = json.loads(line)
    os.chdir(order["folder"])
    if order["do"] == "facts":
        print(json.dumps(facts(order["paths"])))
        return 0
    os.environ.update(torchrun_variables(order, order["interface"] or carrying(order["address"])))
    threading.Thread(target=_end_with_input, daemon=True).start()
    return _torchrun(torchrun_arguments(order))


def _read_line() -> bytes:
    """A line of standard input, without a buffer, whose lock a thread would hold when this ends."""
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

    # The process that failed has said why: what torchrun's loggers add, each at a level of its own, tells of torchrun.
    logging.disable(logging.CRITICAL)
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        failed = error.get_first_failure()[1].exitcode
        return failed if failed > 0 else 128 - failed
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    end_process(main())
