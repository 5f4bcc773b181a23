"""Whether a LoRA adapter can be served on a network: by its files before an engine starts, and by its modules.

vLLM passes over the parts of an adapter that it has no place for. One of which nothing applies would be answered by the
base model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import expected_tensors
from hunyuan_vllm.util.errors import UserError

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_FILE",
    "ATTENTION",
    "MAX_LORA_RANKS",
    "MODULE",
    "absent",
    "check_adapter",
    "check_modules",
    "max_lora_rank",
    "read_adapter_json",
]

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLED = ("adapter_model.bin", "adapter_model.pt")
MLX_FILE = "adapters.safetensors"
MODULE = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])(?:\.\w+)?\.weight$")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MAX_LORA_RANKS = (16, 32, 64, 128, 256, 320, 512)  # those that vLLM takes, from its default on
EXAMPLE = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def check_adapter(folder: Path, config: HunYuanConfig, cpu: bool, max_rank: int | None = None) -> None:
    """Refuse an adapter's folder, from its files' headers alone. Pickled weights are left to vLLM.

    Args:
        cpu: the server computes on CPUs, where adapters act on attention only.
        max_rank: the largest rank that it has room for; None: not checked.

    Raises:
        UserError: it is not a LoRA adapter as PEFT saves it, or would not be served as it was trained.
    """
    rank = _rank(folder)
    if max_rank is not None and rank > max_rank:
        raise UserError(
            f"{folder} has rank {rank}, and the server room for {max_rank}: add --max-lora-rank {max_lora_rank(rank)}"
        )
    file = folder / ADAPTER_FILE
    if not file.exists() and any((folder / name).exists() for name in PICKLED):
        return
    try:
        with safe_open(file, framework="np") as tensors:
            names = list(tensors.keys())
    except FileNotFoundError:
        raise UserError(f"{folder} has no {ADAPTER_FILE}: name the folder that training saved the adapter in") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is cut short or not a safetensors file ({error}): copy it again") from None
    if odd := [name for name in names if not MODULE.match(name)]:
        raise UserError(f"{file}: {odd[0]!r} is not A or B of a linear layer, as in {EXAMPLE}")
    check_modules(str(file), {match["module"] for name in names if (match := MODULE.match(name))}, config, cpu)


def check_modules(
    name: str, modules: Collection[str], config: HunYuanConfig, cpu: bool, targets: Iterable[str] | None = None
) -> None:
    """Refuse an adapter that would be served in part, or not at all.

    Args:
        name: what the message calls it.
        modules: those that it changes, without PEFT's prefix.
        targets: the modules that adapters may act on here, by the ends of their names; None: all.

    Raises:
        UserError: the message names a module and the remedy.
    """
    linear = {tensor.removesuffix(".weight") for tensor, shape in expected_tensors(config).items() if len(shape) == 2}
    linear -= {"model.embed_tokens", "lm_head"}
    linear |= {module.removesuffix(".wg") for module in linear}  # the router, as vLLM's loader of adapters names it
    if not linear.intersection(modules):
        example = f" ({min(modules)}, …)" if modules else ""
        raise UserError(
            f"{name}: none of its {len(modules)} modules{example} is one of this network's: it was trained on another "
            f"model, or saved with another prefix than in {EXAMPLE}"
        )
    if unknown := sorted(set(modules) - linear):
        raise UserError(f"{name}: {absent(unknown[0], config)}")
    if cpu and (others := sorted(module for module in modules if module.rsplit(".", 1)[-1] not in ATTENTION)):
        raise UserError(
            f"{name}: it acts on {others[0]}, and on CPUs adapters act on attention only: merge it into the model "
            "(hunyuan-vllm merge-lora), and serve that"
        )
    if targets is not None and not any(module.endswith(f".{end}") for module in modules for end in targets):
        raise UserError(f"{name}: it acts on none of --lora-target-modules {' '.join(targets)}: leave that option out")


def max_lora_rank(rank: int) -> int:
    """The value of vLLM's --max-lora-rank for an adapter of `rank`; `rank` itself where there is none."""
    return next((size for size in MAX_LORA_RANKS if size >= rank), rank)


def absent(module: str, config: HunYuanConfig) -> str:
    """Why a network has no linear layer of this name."""
    if match := re.match(r"model\.layers\.(\d+)\.(.+)", module):
        layer, part = int(match[1]), match[2]
        if layer >= config.num_hidden_layers:
            return f"{module}: this network has {config.num_hidden_layers} layers: it was trained on another model"
        if part in ("self_attn.k_proj", "self_attn.v_proj") and config.is_cross(layer):
            owner = config.kv_owner(layer)
            return f"{module}: layer {layer} shares the K and V of layer {owner}, and has no {part.split('.')[1]}"
    if module in ("lm_head", "model.embed_tokens"):
        return f"{module}: adapters of the embedding or the head are not served: train it without"
    return f"{module}: this network has no such linear layer: it was trained on another model"


def read_adapter_json(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says, as PEFT writes it.

    Raises:
        UserError: there is none, or the folder holds another library's adapter.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory: name the folder that training saved the adapter in")
    file = folder / ADAPTER_CONFIG
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        given = {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(given, dict):
        raise UserError(f"{file} is not a JSON object: copy the adapter again")
    if "peft_type" not in given and ((folder / MLX_FILE).exists() or "lora_parameters" in given):
        raise UserError(
            f"{folder} holds an adapter of MLX, not of PEFT: fuse it into its model with mlx_lm.fuse, and use that"
        )
    if not file.exists():
        raise UserError(f"{folder} has no {ADAPTER_CONFIG}: name the folder that training saved the adapter in")
    return given


def _rank(folder: Path) -> int:
    """The largest rank that adapter_config.json names."""
    given = read_adapter_json(folder)
    if given.get("peft_type") != "LORA" or not isinstance(given.get("r"), int):
        raise UserError(f"{folder / ADAPTER_CONFIG} is not of a LoRA adapter: it has no rank r, or another peft_type")
    return max([given["r"], *(given.get("rank_pattern") or {}).values()])
