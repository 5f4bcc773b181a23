"""The processes of a run: environment, process group, DeepSpeed config"""

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

REPORT_TIMEOUT: Final = 20.0  # seconds


def is_first() -> bool:
    """Whether this is rank 0, the process that prints."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_first() -> None:
    """Give the first process time to report a mistake that this one has found too.

    Its exit ends this process as well, so returning means that only this process found the mistake. Without the wait,
    a faster process would end the first one before it has reported anything.
    """
    with suppress(KeyboardInterrupt):
        time.sleep(REPORT_TIMEOUT)


def prepare(deepspeed: bool) -> None:
    """Set variables that libraries read when they are imported, and silence warnings meant for developers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # other libraries import DeepSpeed, too
    if deepspeed:
        if "RANK" not in os.environ:  # a single process; DeepSpeed still needs a process group
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
    """Create DeepSpeed's process group, before the model, which ZeRO-3 partitions while it is created.

    CPUs use gloo only: DeepSpeed's shared-memory collectives, which it would compile first, busy-wait, which is slow
    with more processes than cores.
    """
    import deepspeed

    if torch.cuda.is_available():
        deepspeed.init_distributed(dist_backend="nccl")
        return
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")


def leave_processes() -> None:
    """Destroy the process group after a successful run; after a failure this would wait for the other processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


OFFLOADS: Final = ("offload_optimizer", "offload_param")
EXAMPLE: Final = "(see train/ds_zero3_no_offload.json)"


def read_deepspeed_config(given: str) -> dict[str, Any]:
    """The config in a file. "auto" values stay: transformers fills them in."""
    try:
        config = json.loads(Path(given).read_text())
    except OSError as error:
        raise UserError(f"--deepspeed {given} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--deepspeed {given} is not JSON: {error}") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        raise UserError(f'--deepspeed {given}: "zero_optimization" needs a "stage", 0 to 3 {EXAMPLE}')
    for name in OFFLOADS:
        if not isinstance(zero.get(name), dict | None):
            raise UserError(f'--deepspeed {given}: "{name}" is not an object such as {{"device": "cpu"}} {EXAMPLE}')
    if "train_micro_batch_size_per_gpu" not in config:
        raise UserError(f'--deepspeed {given} lacks "train_micro_batch_size_per_gpu": "auto" takes the flag {EXAMPLE}')
    if zero["stage"] == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            f'--deepspeed {given}: "zero_optimization" needs "stage3_gather_16bit_weights_on_model_save": true, or '
            f"nothing that serves could be saved {EXAMPLE}"
        )
    return config


def without_offload(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The config for this machine, and a line for each change."""
    config = copy.deepcopy(config)
    zero = config["zero_optimization"]
    found = [name for name in OFFLOADS if (zero.get(name) or {}).get("device", "none") != "none"]
    if not found or torch.cuda.is_available():
        return config, []
    for name in found:
        del zero[name]
    return config, [f"{', '.join(found)} of DeepSpeed's config changes nothing: there is no GPU to offload from"]
