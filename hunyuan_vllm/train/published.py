"""A trained model's folder, as it is served: tensors as the published checkpoints have them, and the files beside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.train.router import merged

__all__ = ["as_published", "copy_served_files", "read_origin", "set_dtype", "write_origin"]

ORIGIN: Final = "trained_from.json"
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
        for name, tensor in merged(state).items()
        if name not in tied
    }


def copy_served_files(folder: Path, tokenizer: Path, base: Path | None) -> None:
    """Put the tokenizer's files, and the generation config of `base`, beside a model's weights."""
    for name in TOKENIZER:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    for source in (base, tokenizer):
        if source is not None and (source / "generation_config.json").is_file():
            shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
            return


def write_origin(folder: Path, base: Path | None, dtype: torch.dtype) -> None:
    """Note beside weights what they were trained from, and the type that the result is to have."""
    origin = {"base": str(base) if base else None, "served_dtype": str(dtype).removeprefix("torch.")}
    (folder / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")


def read_origin(folder: Path) -> tuple[Path | None, torch.dtype] | None:
    """What `write_origin` noted; None where nothing was."""
    try:
        origin = json.loads((folder / ORIGIN).read_text())
    except OSError:
        return None
    return Path(origin["base"]) if origin["base"] else None, getattr(torch, origin["served_dtype"])


def set_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Have a folder's config.json name the type that its tensors have."""
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    fields["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
