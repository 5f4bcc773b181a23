"""LoRA adapters on disk, and whether one can be served on a network: by its files and by its modules.

vLLM ignores the parts of an adapter that match no module. Without these checks, requests for an adapter that matches
none would be answered by the base model.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from hunyuan_vllm.layout import expected_tensors
from hunyuan_vllm.network import Network
from hunyuan_vllm.util.errors import UserError

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLED = ("adapter_model.bin", "adapter_model.pt")
MLX_FILE = "adapters.safetensors"
MODULE = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])(?:\.\w+)?\.weight$")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MAX_LORA_RANKS = (16, 32, 64, 128, 256, 320, 512)  # values of vLLM's --max-lora-rank from its default on
EXAMPLE = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


class AdapterConfig(BaseModel):
    """The adapter_config.json that PEFT wrote. Fields that are not declared here are in `model_extra`.

    Attributes:
        rank_pattern, alpha_pattern: exceptions, by the end of a module's name or a regular expression for it.
        use_rslora: the scale is alpha / √r instead of alpha / r.
    """

    model_config = ConfigDict(extra="allow")

    peft_type: str
    r: int = Field(gt=0)
    lora_alpha: float
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None
    target_modules: list[str] | str | None = None
    lora_dropout: float = 0.0

    @property
    def max_rank(self) -> int:
        return max([self.r, *(self.rank_pattern or {}).values()])

    def rank(self, module: str) -> int:
        return _matching(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """The factor of B·A."""
        rank, alpha = self.rank(module), _matching(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _matching(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """As PEFT looks it up: the first pattern that matches the module's name or an end of it."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def check_adapter(directory: Path, config: Network, cpu: bool, max_rank: int | None = None) -> None:
    """Refuse an adapter's directory, from its files' headers alone. Pickled weights are left to vLLM."""
    rank = read_adapter_config(directory).max_rank
    if max_rank is not None and rank > max_rank:
        raise UserError(
            f"{directory} has rank {rank}, but the server allows {max_rank}: add --max-lora-rank {max_lora_rank(rank)}"
        )
    file = directory / ADAPTER_FILE
    if not file.exists() and any((directory / name).exists() for name in PICKLED):
        return
    try:
        names = list(read_shapes(file))
    except FileNotFoundError:
        raise UserError(
            f"{directory} has no {ADAPTER_FILE}: name the directory that training saved the adapter in"
        ) from None
    if odd := [name for name in names if not MODULE.match(name)]:
        raise UserError(f"{file}: {odd[0]!r} is not A or B of a linear layer, as in {EXAMPLE}")
    check_modules(str(file), {match["module"] for name in names if (match := MODULE.match(name))}, config, cpu)


def check_modules(
    name: str, modules: Collection[str], config: Network, cpu: bool, targets: Iterable[str] | None = None
) -> None:
    """Refuse an adapter that would be served in part, or not at all.

    Args:
        name: what the message calls it.
        modules: those that it changes, without PEFT's prefix.
        targets: the modules that adapters may act on here, by the ends of their names; None: all.
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


def absent(module: str, config: Network) -> str:
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


def read_adapter_config(directory: Path) -> AdapterConfig:
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: name the one that training saved the adapter in")
    file = directory / ADAPTER_CONFIG
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        given = {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(given, dict):
        raise UserError(f"{file} is not a JSON object: copy the adapter again")
    if "peft_type" not in given and ((directory / MLX_FILE).exists() or "lora_parameters" in given):
        raise UserError(
            f"{directory} holds an adapter of MLX, not of PEFT: fuse it into its model with mlx_lm.fuse, and use that"
        )
    if not file.exists():
        raise UserError(f"{directory} has no {ADAPTER_CONFIG}: name the directory that training saved the adapter in")
    try:
        config = AdapterConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if config.peft_type != "LORA":
        raise UserError(f"{file}: peft_type is {config.peft_type!r}, and only LORA adapters are served or merged")
    return config


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors, by name.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is damaged.
    """
    try:
        with safe_open(file, framework="np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or not a safetensors file ({error}): copy it again") from None
