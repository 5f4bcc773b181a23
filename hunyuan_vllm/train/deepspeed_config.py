"""DeepSpeed's config: read, checked for what is done with it here, and fitted to a machine without GPUs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Final

import torch

from hunyuan_vllm.errors import UserError

__all__ = ["fitted", "read_config"]

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
