"""The demo checkpoint in pieces and in other formats, to be damaged; and what a check of it found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import rewrite, write_shards
from safetensors.torch import load_file
from torch import Tensor

from hunyuan_vllm import demo
from hunyuan_vllm.check.run import Report, check_directory
from hunyuan_vllm.quant.formats import PACKED, PLAIN
from hunyuan_vllm.quant.layouts import is_quantised
from hunyuan_vllm.quant.quantization_config import describe
from hunyuan_vllm.quant.rounding import pack_int8, quantize_per_channel, quantize_per_tensor
from hunyuan_vllm.util.findings import Finding, Status

FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
SHARD_BYTES = 2 << 20


def copy_demo(directory: Path) -> Path:
    for file in demo.path().iterdir():
        if file.suffix in (".json", ".safetensors", ".tiktoken"):
            shutil.copy(file, directory / file.name)
    return directory


def copy_sharded(directory: Path) -> Path:
    tensors = load_file(demo.path() / "model.safetensors")
    copy_demo(directory)
    (directory / "model.safetensors").unlink()
    write_shards(directory, iter(tensors.items()), SHARD_BYTES)
    return directory


def edit_json(file: Path, **fields: Any) -> None:
    """Set fields; None removes one."""
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def quantise(directory: Path, kind: str) -> Path:
    """Store the demo model in "fp8", PACKED or PLAIN."""
    copy_demo(directory)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if is_quantised(name)]:
            stem, weight = name.removesuffix("weight"), tensors.pop(name)
            if kind == "fp8":
                tensors[name], tensors[f"{stem}weight_scale"] = quantize_per_tensor(weight)
                tensors[f"{stem}input_scale"] = torch.tensor(0.02)
                continue
            levels, tensors[f"{stem}weight_scale"] = quantize_per_channel(weight)
            if kind == PLAIN:
                tensors[name] = levels
            else:
                tensors[f"{stem}weight_packed"] = pack_int8(levels)
                tensors[f"{stem}weight_shape"] = torch.tensor(weight.shape)

    rewrite(directory, change)
    edit_json(directory / "config.json", quantization_config=FP8 if kind == "fp8" else describe(kind))
    return directory


def change_tensors(directory: Path, **changes: Callable[[Tensor], Tensor]) -> None:
    """Apply a function to each tensor whose name ends with a key; "__" in it stands for a dot."""

    def change(tensors: dict[str, Tensor]) -> None:
        for end, function in changes.items():
            (name,) = [name for name in tensors if name.endswith(end.replace("__", "."))]
            tensors[name] = function(tensors[name])

    rewrite(directory, change)


def findings(report: Report, status: Status = Status.PROBLEM) -> list[Finding]:
    return [finding for section in report.sections for finding in section.findings if finding.status == status]


def only_problem(directory: Path) -> Finding:
    """The one problem that a check of `directory` finds; every problem has a remedy."""
    (problem,) = findings(check_directory(directory))
    assert problem.remedy
    return problem


__all__ = [
    "FP8", "PACKED", "PLAIN", "change_tensors", "check_directory", "copy_demo", "copy_sharded", "edit_json", "findings",
    "only_problem", "quantise",
]  # fmt: skip
