"""What the processes of a run need before any of them computes: DeepSpeed's variables, and who may speak."""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from contextlib import suppress
from typing import Final

import torch
import transformers

__all__ = ["is_first", "join_processes", "leave_processes", "prepare", "wait_for_first"]

FIRST_SPEAKS: Final = 20.0  # seconds


def is_first() -> bool:
    """Whether this is the process that speaks: rank 0 of all."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_first() -> None:
    """Give the first process time to say of a mistake what this one knows too.

    Its end ends this process as well, so returning means that the mistake is this process's own. Without the wait, the
    process that happened to be quickest would end the first, and nobody would have said anything.
    """
    with suppress(KeyboardInterrupt):
        time.sleep(FIRST_SPEAKS)


def prepare(deepspeed: bool) -> None:
    """Set what libraries read from the environment when they are imported, and quieten what tells a user nothing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # also where DeepSpeed is only looked at by other libraries
    if deepspeed:
        if "RANK" not in os.environ:  # started by itself; DeepSpeed wants a group, if of one
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            os.environ.update(alone, MASTER_PORT=str(port))
    logging.basicConfig(format="hunyuan-vllm: %(message)s", level=logging.WARNING if is_first() else logging.ERROR)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    transformers.utils.logging.disable_progress_bar()
    for module in ("torch", "deepspeed", "accelerate", "peft", "transformers"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{module}\b.*")
        warnings.filterwarnings("ignore", category=UserWarning, module=rf"{module}\b.*")


def join_processes() -> None:
    """Make DeepSpeed's process group; before the model, which ZeRO-3 parts among its processes while it is made.

    On CPUs they talk by gloo alone: the collectives in shared memory, which DeepSpeed would compile first, wait in
    loops, which is slow where there are more processes than cores.
    """
    import deepspeed

    if torch.cuda.is_available():
        deepspeed.init_distributed(dist_backend="nccl")
        return
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")


def leave_processes() -> None:
    """End the process group, whoever made it; for a run that has come to its end.

    One that failed leaves that to its exit: here it would wait for what the others no longer answer.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
