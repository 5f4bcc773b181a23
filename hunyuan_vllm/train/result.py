"""What a run ends with, in a folder that serves: an adapter in PEFT's layout, or a published-layout checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from hunyuan_vllm.train.disk import saving
from hunyuan_vllm.train.published import set_dtype
from hunyuan_vllm.train.trainer import HunYuanTrainer
from hunyuan_vllm.train.whole import STAGING, name_whole

__all__ = ["save_result"]


def save_result(trainer: HunYuanTrainer, folder: Path, dtype: torch.dtype) -> str:
    """Save the trained weights to `folder`, which gets its name when it is whole; says in words what it is.

    Every process must call this: under ZeRO-3 each holds a part. A full model is saved in `dtype`, routers in float32.

    Raises:
        DiskError: it could not be written.
    """
    beside = folder.parent / STAGING / folder.name
    is_adapter = hasattr(trainer.model, "peft_config")
    with saving("the result", folder.parent):
        trainer.served_dtype = dtype
        trainer.save_model(str(beside))
        trainer.served_dtype = None
        if trainer.args.should_save:
            if not is_adapter:
                set_dtype(beside, dtype)
            name_whole(beside, folder)
    return "an adapter" if is_adapter else "a checkpoint"
