"""What int8 quantisation should compute, in a few lines on the reference model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from shutil import copytree

import torch
from checkpoints import rewrite
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from golden_data import Golden, answers_of
from torch import Tensor, nn

from hunyuan_vllm.quant.quantization_config import describe
from hunyuan_vllm.reference import HunYuanForCausalLM

__all__ = ["int8_answers", "int8_model", "rounded", "write_int8"]


def int8_model(directory: Path, *, activations: bool = False, ranks: int = 1) -> HunYuanForCausalLM:
    """The checkpoint in float32, each projection's weight rounded to 127 levels a side of each output channel's
    greatest; with `activations` each projection's input too, token by token, of each rank's share of it."""
    model = HunYuanForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name.endswith("_proj"):
            linear.weight.data = rounded(linear.weight.data)
            if activations:
                split = ranks if name.endswith(("o_proj", "down_proj")) else 1
                linear.register_forward_pre_hook(
                    lambda _, inputs, split=split: torch.cat([rounded(part) for part in inputs[0].chunk(split, -1)], -1)
                )
    return model


def int8_answers(directory: Path, prompts: Sequence[list[int]], max_new_tokens: int = 8, **options) -> Golden:
    """The answers of `int8_model`."""
    return answers_of(int8_model(directory, **options), directory, prompts, max_new_tokens)


def rounded(x: Tensor) -> Tensor:
    """To 127 levels a side, row by row."""
    step = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((x / step).round() * step).to(x.dtype)


def write_int8(source: Path, directory: Path, form: str) -> Path:
    """A copy of a checkpoint as compressed-tensors keeps it: "pack-quantized" or "int-quantized"; returns it."""
    copytree(source, directory)

    def quantise(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight = tensors.pop(name).float()
            scale = weight.abs().amax(1, keepdim=True) / 127
            levels = (weight / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
            if form == "pack-quantized":
                tensors[f"{name}_packed"] = pack_to_int32(levels, 8)
                tensors[f"{name}_shape"] = torch.tensor(levels.shape)
            else:
                tensors[name] = levels

    rewrite(directory, quantise)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = describe(form, ["lm_head"])
    (directory / "config.json").write_text(json.dumps(config))
    return directory
