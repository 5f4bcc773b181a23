"""Runs of training in processes forked from the test's own, which has imported all they need: a second each."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401
import torch
from checkpoints import tiny_config

from hunyuan_vllm import demo
from hunyuan_vllm.reference import HunYuanForCausalLM
from hunyuan_vllm.train import trainer  # noqa: F401
from hunyuan_vllm.train.run import main

__all__ = ["DATA", "Run", "begin", "flags", "log_of", "make_base", "train"]

DATA = Path(__file__).parents[2] / "train" / "data" / "train.jsonl"
STEPS = 20
UNENDED = 98  # the status of a process whose group of processes was still there when its run had ended


def make_base(directory: Path, **overrides: Any) -> Path:
    """A small new network of the published kind, with the demo model's tokenizer."""
    tokens = dict(vocab_size=2048, bos_token_id=1801, eos_token_id=1803, pad_token_id=1804)
    shape = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=48, tie_word_embeddings=True)
    shape |= dict(torch_dtype="float32")
    torch.manual_seed(0)
    HunYuanForCausalLM(tiny_config(**tokens | shape | overrides)).save_pretrained(directory)
    for name in ("hy.tiktoken", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(Path(demo.__file__).with_name(name), directory)
    return directory


def flags(base: Path, output: Path, *more: str, rows: int = 8) -> list[str]:
    """Twenty steps over the shipped data. A large epsilon: Adam's first steps would make a sign of rounding errors."""
    return [
        "--model_name_or_path", str(base), "--train_data_file", str(DATA), "--output_dir", str(output),
        "--max_steps", str(STEPS), "--save_steps", "10", "--logging_steps", "1", "--learning_rate", "1e-3",
        "--adam_epsilon", "1e-4", "--per_device_train_batch_size", str(rows), *more,
    ]  # fmt: skip


@dataclass
class Run:
    """A run that has ended: its exit statuses, and all that its processes printed."""

    statuses: list[int]
    said: str


def begin(argv: Sequence[str], log: Path, ranks: int = 1, first: Callable[[], None] | None = None) -> list[int]:
    """Start it; the processes' ids. `first` is called in each before it does anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pids = []
    for rank in range(ranks):
        if pid := os.fork():
            pids.append(pid)
            continue
        status = 99
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            if ranks > 1:
                many = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_PORT=port)
                os.environ.update({name: str(value) for name, value in many.items()}, MASTER_ADDR="127.0.0.1")
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)
            if first is not None:
                first()
            status = main(argv)
            if status == 0 and torch.distributed.is_initialized():
                status = UNENDED
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pids


def train(argv: Sequence[str], log: Path, ranks: int = 1, first: Callable[[], None] | None = None) -> Run:
    """Run it to its end."""
    pids = begin(argv, log, ranks, first)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return Run(statuses, log.read_text())


def log_of(output: Path, step: int = STEPS, key: str = "loss") -> list[float]:
    """What was logged at each step, as a checkpoint remembers it."""
    state = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [float(entry[key]) for entry in state["log_history"] if key in entry]
