"""A trained model in the published layout: tensors, config and the files that serving needs"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from hunyuan_vllm.checkpoint import shard_files
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.reference import Float32Linear

ROUTER = ".gate.wg.weight"
START = ".gate.wg.start"


class SplitLinear(nn.Module):
    """A router's linear layer whose weight is `start`, a float32 buffer, plus `weight`, which is trained from zero.

    DeepSpeed casts parameters to bfloat16, but not buffers. The change is small, so bfloat16 holds it much more
    precisely than the whole weight; `start + weight` in float32 is used, saved and served. Weight decay pulls towards
    `start`, not towards zero.

    Args:
        weight: the parameter; under ZeRO-3 a partition of it.
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
    """Replace every router of `model` by a `SplitLinear`.

    Args:
        start: exact weights by name; needed under ZeRO-3.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, Float32Linear):
            continue
        weight = module.get_parameter("weight")
        exact = weight.data.float().clone() if start is None else start[f"{name}.weight"].to(weight.device)
        if start is None:
            weight.data = torch.zeros_like(weight.data)
        else:
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([weight], modifier_rank=0):
                weight.data.zero_()
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, SplitLinear(weight, exact))


def read_routers(directory: Path) -> dict[str, Tensor]:
    """The routers' weights of a checkpoint, by name, in float32."""
    found: dict[str, Tensor] = {}
    for shard in shard_files(directory):
        with safe_open(shard, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name).float() for name in tensors.keys() if name.endswith(ROUTER)}
    return found


def join_routers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the routers' sums, the reverse of `split_routers`."""
    joined = {}
    for name, tensor in state.items():
        if name.endswith(START):
            continue
        start = state.get(name.removesuffix(ROUTER) + START) if name.endswith(ROUTER) else None
        joined[name] = tensor if start is None else start.to(tensor.device) + tensor.float()
    return joined


TOKENIZER: Final = (
    "hy.tiktoken", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def as_published(
    state: Mapping[str, Tensor], config: HunYuanConfig, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """`state` under the published names, in `dtype` where one is given; routers stay in float32."""
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {
        name: tensor if dtype is None or name.endswith(".gate.wg.weight") else tensor.to(dtype)
        for name, tensor in join_routers(state).items()
        if name not in tied
    }


def copy_served_files(directory: Path, tokenizer: Path, base: Path | None) -> None:
    """Put the tokenizer's files, and the generation config of `base`, beside a model's weights."""
    for name in TOKENIZER:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, directory / name)
    for source in (base, tokenizer):
        if source is not None and (source / "generation_config.json").is_file():
            shutil.copyfile(source / "generation_config.json", directory / "generation_config.json")
            return


def write_config(directory: Path, source: Path | None, dtype: torch.dtype, served: torch.dtype) -> None:
    """Write the config.json of trained weights: that of `source`, in its spelling, with the weights' type, and as
    `served_dtype` that of the run's result where it is another one, which a resumed run needs.

    transformers would write its own spellings, and its class in `architectures`, which tells a V1 network from
    Hunyuan-Large. `auto_map` goes, since the code that it names is not copied. Without a source, the config that
    transformers has written stays.
    """
    fields = json.loads(((source or directory) / "config.json").read_text())
    for name in ("auto_map", "served_dtype"):
        fields.pop(name, None)
    fields["torch_dtype" if "torch_dtype" in fields else "dtype"] = str(dtype).removeprefix("torch.")
    if served != dtype:
        fields["served_dtype"] = str(served).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
