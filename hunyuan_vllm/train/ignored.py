"""Flags that a run was given and that change nothing in it, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hunyuan_vllm.train.arguments import SHAPE, WITHOUT_EFFECT
from hunyuan_vllm.train.parse import Arguments

__all__ = ["ignored"]

LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules")
OF_A_FILE = ("train_data_file", "packing", "train_on_all", "default_system")


def ignored(arguments: Arguments, deepspeed: dict[str, Any] | None = None) -> Iterator[str]:
    """A line for each; `deepspeed` is its config."""
    zero_stage = deepspeed["zero_optimization"]["stage"] if deepspeed else None
    given, model, training = arguments.given, arguments.model, arguments.training

    def say(names: tuple[str, ...], why: str) -> Iterator[str]:
        if found := [f"--{name}" for name in names if name in given]:
            yield f"{', '.join(found)} changes nothing: {why}"

    for name, why in WITHOUT_EFFECT.items():
        yield from say((name,), why)
    if "model_name_or_path" in given or "resume_from_checkpoint" in given:
        yield from say(SHAPE, "the network has the shape its checkpoint says")
    if not model.use_lora:
        yield from say(LORA, "--use_lora is not given")
    elif model.train_attention_params_only:
        yield from say(("train_attention_params_only",), "LoRA trains its adapters alone")
    if zero_stage != 3:
        yield from say(("make_moe_param_leaf_module",), "it is about ZeRO-3, and --deepspeed names no such config")
    if not torch.cuda.is_available():
        yield from say(("use_flash_attn",), "there is no GPU")
    if "scheduler" in (deepspeed or {}):
        yield from say(("min_lr", "lr_scheduler_type"), "DeepSpeed's config has a scheduler of its own")
    elif training.lr_scheduler_type != "cosine_with_min_lr":
        yield from say(("min_lr",), "only --lr_scheduler_type cosine_with_min_lr ends at it")
    if "warmup_steps" in given:
        yield from say(("warmup_ratio",), "--warmup_steps is given")
    if training.max_steps > 0:
        yield from say(("num_train_epochs",), "--max_steps says when it ends")
    if arguments.data.use_dummy_data:
        yield from say(OF_A_FILE, "--use_dummy_data needs no file")
    if arguments.data.eval_data_file is None:
        yield from say(("eval_steps", "eval_strategy", "per_device_eval_batch_size"), "--eval_data_file is not given")
