"""What the processes of a run need before any of them computes"""

from __future__ import annotations

import copy
import json
import logging
import os
import socket
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from hunyuan_vllm.util.errors import UserError

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


OFFLOADS: Final = ("offload_optimizer", "offload_param")
EXAMPLE: Final = "(see train/ds_zero3_no_offload.json)"


def read_config(given: str) -> dict[str, Any]:
    """The config in a file. "auto" values stay: transformers fills them in.

    Raises:
        UserError: it is not there, not JSON, or lacks something.
    """
    try:
        config = json.loads(Path(given).read_text())
    except OSError as error:
        raise UserError(f"--deepspeed {given} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--deepspeed {given} is not JSON: {error}") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        raise UserError(f'--deepspeed {given}: "zero_optimization" needs a "stage", 0 to 3 {EXAMPLE}')
    if "train_micro_batch_size_per_gpu" not in config:
        raise UserError(f'--deepspeed {given} lacks "train_micro_batch_size_per_gpu": "auto" takes the flag {EXAMPLE}')
    if zero["stage"] == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            f'--deepspeed {given}: "zero_optimization" needs "stage3_gather_16bit_weights_on_model_save": true, or '
            f"nothing that serves could be saved {EXAMPLE}"
        )
    return config


def fitted(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The config for this machine, and a line for each thing that was changed in it."""
    config = copy.deepcopy(config)
    zero = config["zero_optimization"]
    found = [name for name in OFFLOADS if zero.get(name, {}).get("device", "none") != "none"]
    if not found or torch.cuda.is_available():
        return config, []
    for name in found:
        del zero[name]
    return config, [f"{', '.join(found)} of DeepSpeed's config changes nothing: there is no GPU to take memory from"]
