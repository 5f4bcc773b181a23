"""Start a run's processes, on this node and over SSH on the others, and end all of them when one fails"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final

from hunyuan_vllm.ray_environment import without_secrets
from hunyuan_vllm.train.nodes import NodeOfRun, compare, read_nodes, torchrun_arguments, torchrun_variables
from hunyuan_vllm.train.run import flag_value
from hunyuan_vllm.train.run import main as train
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.net import interface_of, own_interfaces
from hunyuan_vllm.util.text import plural

# Prefixes of the variables that are passed to other nodes.
PASSED: Final = ("NCCL_", "GLOO_", "TP_SOCKET", "CUDA_", "TORCH_", "DS_", "OMP_", "HF_", "TOKENIZERS_", "PYTORCH_")
PATHS: Final = ("model_name_or_path", "tokenizer_name_or_path", "train_data_file", "eval_data_file", "deepspeed")
GRACE: Final = 20.0  # seconds for the other processes to exit once one has failed
DRAIN: Final = 2.0  # seconds for the last output of a node
CONNECT: Final = 20  # seconds


class Launch:
    """A run on some nodes, of which the first is this one.

    Args:
        port: of the rendezvous, on this node.
    """

    def __init__(self, nodes: Sequence[NodeOfRun], port: int, flags: Sequence[str], environ: Mapping[str, str]) -> None:
        self._nodes, self._flags, self._port = nodes, list(flags), port
        self._ssh_port, self._interface = environ.get("SSH_PORT", ""), environ.get("SOCKET_IFNAME") or None
        self._variables = without_secrets({name: value for name, value in environ.items() if name.startswith(PASSED)})

    @property
    def is_one_process(self) -> bool:
        return len(self._nodes) == 1 and self._nodes[0].processes == 1

    @property
    def alone(self) -> list[str]:
        """The command where there is one process."""
        return [sys.executable, "-m", "hunyuan_vllm.train", *self._flags]

    def order(self, rank: int) -> dict[str, Any]:
        node = self._nodes[rank]
        return {
            "do": "run", "directory": os.getcwd(), "address": node.address, "interface": self._interface,
            "nodes": len(self._nodes), "rank": rank, "processes": node.processes,
            "master": [self._nodes[0].address, self._port], "flags": self._flags, "variables": self._variables,
        }  # fmt: skip

    def shown(self) -> str:
        """The commands of all nodes, for --dry-run."""
        if self.is_one_process:
            return shlex.join(self.alone)
        parts = []
        for rank, node in enumerate(self._nodes):
            order = self.order(rank)
            interface = self._interface or (
                interface_of(node.address, own_interfaces()) if rank == 0 else f"<the one with {node.address}>"
            )
            variables = [f"{k}={shlex.quote(v)}" for k, v in sorted(torchrun_variables(order, interface).items())]
            how = "this node" if rank == 0 else f"over {shlex.join(self._ssh(node)[:-1])}"
            words = [sys.executable, "-m", "torch.distributed.run", *torchrun_arguments(order)]
            head = f"{node.address} ({how}), {plural(node.processes, 'process')}:"
            parts.append(f"{head}\n  cd {shlex.quote(os.getcwd())}\n  {' '.join(variables)} {shlex.join(words)}")
        return "\n".join(parts)

    def check(self) -> None:
        """Compare code, libraries, checkpoint and data of all nodes."""
        given = (flag_value(self._flags, name) for name in PATHS)
        paths = [path for path in given if path and Path(path).exists()]
        order = json.dumps({"do": "facts", "directory": os.getcwd(), "paths": paths}) + "\n"

        def ask(rank: int) -> subprocess.CompletedProcess[bytes]:
            return subprocess.run(self._command(rank), input=order.encode(), capture_output=True)

        with ThreadPoolExecutor(len(self._nodes)) as pool:
            answers = list(pool.map(ask, range(len(self._nodes))))
        found = {}
        for node, answer in zip(self._nodes, answers, strict=True):
            if answer.returncode != 0:
                reason = ["no message", *answer.stderr.decode(errors="replace").strip().splitlines()][-1]
                raise UserError(
                    f"{node.address}: {reason} (python3 deploy/login_ssh.py sets up the logins; every node needs the "
                    "same checkout at the same path, set up by sh deploy/setup_env.sh --train)"
                )
            found[node.address] = json.loads(answer.stdout.splitlines()[-1])
        compare(found)

    def run(self) -> int:
        """Start all nodes' processes and wait; returns the exit status of the first node that failed, else 0."""
        running, passing = [], []
        try:
            for rank, node in enumerate(self._nodes):
                output = None if rank == 0 else subprocess.PIPE
                # In its own session, so that only this process gets Ctrl-C and ends all nodes.
                process = subprocess.Popen(
                    self._command(rank), stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
                )
                running.append(process)
                assert process.stdin is not None
                with suppress(BrokenPipeError):  # it has ended, and its status will say how
                    process.stdin.write(json.dumps(self.order(rank)).encode() + b"\n")
                    process.stdin.flush()
                for stream in (process.stdout, process.stderr):
                    if stream is not None:
                        passing.append(threading.Thread(target=_pass_on, args=(stream, node.address), daemon=True))
                        passing[-1].start()
            return _wait(running)
        except KeyboardInterrupt:
            return 130
        finally:
            _end(running)
            for thread in passing:
                thread.join(DRAIN)

    def _command(self, rank: int) -> list[str]:
        module = [sys.executable, "-m", "hunyuan_vllm.train.nodes"]
        return module if rank == 0 else [*self._ssh(self._nodes[rank]), shlex.join(module)]

    def _ssh(self, node: NodeOfRun) -> list[str]:
        """Without prompts: an unknown host key or a refused login is an error."""
        options = ["BatchMode=yes", "StrictHostKeyChecking=yes", f"ConnectTimeout={CONNECT}", "ServerAliveInterval=15"]
        port = ["-p", self._ssh_port] if self._ssh_port else []
        return ["ssh", *(word for option in options for word in ("-o", option)), *port, node.address, "--"]


def main(argv: Sequence[str]) -> int:
    """`train/train.sh`: flags of the training, and --dry-run. Returns the exit status."""
    dry_run = "--dry-run" in argv or "--dry_run" in argv
    flags = [word for word in argv if word not in ("--dry-run", "--dry_run")]
    if {"-h", "--help", "--help-all"} & set(flags):
        return train(flags)
    try:
        nodes, port = read_nodes(os.environ, _count_gpus)
        launch = Launch(nodes, port, flags, os.environ)
        if dry_run:
            print(launch.shown())
            return 0
        if launch.is_one_process:
            os.execv(sys.executable, launch.alone)
        if len(nodes) > 1:
            print(f"hunyuan-vllm: comparing {len(nodes)} nodes", file=sys.stderr)
            launch.check()
        return launch.run()
    except UserError as error:
        print(f"hunyuan-vllm: {error}", file=sys.stderr)
        return 2


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _pass_on(stream: IO[bytes], name: str) -> None:
    for line in stream:
        sys.stderr.write(f"[{name}] {line.decode(errors='replace')}")
        sys.stderr.flush()


def _wait(running: Sequence[subprocess.Popen[bytes]]) -> int:
    left = list(running)
    while left:
        for process in left:
            if process.poll() is not None:
                left.remove(process)
                if process.returncode:
                    return process.returncode if process.returncode > 0 else 128 - process.returncode
                break
        else:
            time.sleep(0.2)
    return 0


def _end(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Close each process's standard input, which ends it; kill those that do not exit."""
    for process in running:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
    deadline = time.monotonic() + GRACE
    for process in running:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
