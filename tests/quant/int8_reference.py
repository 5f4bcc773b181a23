"""What int8 quantisation should compute, in a few lines on the reference model, without the package's own code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from golden_data import Golden, answers_of
from torch import Tensor, nn

from hunyuan_vllm.reference import HunYuanForCausalLM

__all__ = ["int8_answers", "int8_model"]


def int8_model(folder: Path, *, activations: bool = False, ranks: int = 1) -> HunYuanForCausalLM:
    """The checkpoint in float32, each projection's weight rounded to 127 levels a side of each output channel's
    greatest; with `activations` each projection's input too, token by token, of each rank's share of it."""
    model = HunYuanForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name.endswith("_proj"):
            linear.weight.data = rounded(linear.weight.data)
            if activations:
                split = ranks if name.endswith(("o_proj", "down_proj")) else 1
                linear.register_forward_pre_hook(
                    lambda _, inputs, split=split: torch.cat([rounded(part) for part in inputs[0].chunk(split, -1)], -1)
                )
    return model


def int8_answers(folder: Path, prompts: Sequence[list[int]], max_new_tokens: int = 8, **options) -> Golden:
    """The answers of `int8_model`."""
    return answers_of(int8_model(folder, **options), folder, prompts, max_new_tokens)


def rounded(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (x / step).round() * step
