"""Routers in float32 under DeepSpeed, which keeps every parameter in bfloat16: what they were, and what was added."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from hunyuan_vllm.checkpoint import shard_files
from hunyuan_vllm.reference import Float32Linear

__all__ = ["SplitLinear", "merged", "read_routers", "split_routers"]

ROUTER = ".gate.wg.weight"
START = ".gate.wg.start"


class SplitLinear(nn.Module):
    """A router's linear whose weight is `start`, a float32 buffer, plus `weight`, which is trained from zero.

    A buffer keeps its type. The sum is small at first, so bfloat16 (beside which DeepSpeed keeps float32) holds it far
    more finely than it could the weight: what is computed with, saved and served is `start + weight` in float32.
    Weight decay pulls towards `start`, not towards zero.

    Args:
        weight: the parameter to use; under ZeRO-3 a part of one.
        start: [experts, hidden], float32.
    """

    start: Tensor

    def __init__(self, weight: nn.Parameter, start: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("start", start)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.start + self.weight.float())


def split_routers(model: nn.Module, start: Mapping[str, Tensor] | None = None) -> None:
    """Make every router of `model` a `SplitLinear`.

    Args:
        start: weights by name, where the model does not hold them whole and exactly (under ZeRO-3).
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, Float32Linear):
            continue
        weight = module.get_parameter("weight")
        exact = weight.data.float().clone() if start is None else start[f"{name}.weight"].to(weight.device)
        _zero(weight)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, SplitLinear(weight, exact))


def read_routers(folder: Path) -> dict[str, Tensor]:
    """The routers' weights of a checkpoint, by name, in float32."""
    found: dict[str, Tensor] = {}
    for shard in shard_files(folder):
        with safe_open(shard, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name).float() for name in tensors.keys() if name.endswith(ROUTER)}
    return found


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with whole routers again."""
    whole = {}
    for name, tensor in state.items():
        if name.endswith(START):
            continue
        start = state.get(name.removesuffix(ROUTER) + START) if name.endswith(ROUTER) else None
        whole[name] = tensor if start is None else start.to(tensor.device) + tensor.float()
    return whole


def _zero(parameter: nn.Parameter) -> None:
    if not hasattr(parameter, "ds_id"):
        parameter.data = torch.zeros_like(parameter.data)
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.zero_()
