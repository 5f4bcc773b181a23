"""adapter_config.json of a LoRA adapter: rank and scale of each module, and what cannot be merged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hunyuan_vllm.adapter import ADAPTER_CONFIG, read_adapter_json
from hunyuan_vllm.errors import UserError

__all__ = ["AdapterConfig", "read_adapter_config"]

# Fields of PEFT's LoraConfig that, where they are set, make of an adapter something that is not W + scale · B·A.
NOT_PLAIN = {
    "use_dora": "DoRA rescales whole columns",
    "use_qalora": "QALoRA groups the inputs",
    "lora_bias": "its B has a bias, for which the network has no place",
    "fan_in_fan_out": "its matrices are transposed",
    "layer_replication": "it repeats layers of the network",
    "megatron_config": "its matrices are cut for tensor parallelism",
    "modules_to_save": "it holds whole modules besides",
    "trainable_token_indices": "it holds rows of the embedding besides",
    "target_parameters": "it acts on parameters, not on modules",
    "alora_invocation_tokens": "it acts on some tokens only",
    "arrow_config": "it chooses among several adapters, token by token",
    "monteclora_config": "its weights are random",
    "velora_config": "it is no plain adapter",
    "use_bdlora": "its matrices are block-diagonal",
}
# Initialisations that change the network's own weights: an adapter saved without conversion belongs to those.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterConfig(BaseModel):
    """What PEFT wrote, as far as it decides what an adapter computes.

    Attributes:
        r: rank.
        lora_alpha: numerator of the scale.
        rank_pattern, alpha_pattern: exceptions, by the end of a module's name or a regular expression for it.
        use_rslora: the scale is alpha / √r instead of alpha / r.
    """

    model_config = ConfigDict(extra="allow")

    peft_type: str
    r: int = Field(gt=0)
    lora_alpha: float
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True

    def rank(self, module: str) -> int:
        return self._exception(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What B·A is multiplied with."""
        rank, alpha = self.rank(module), self._exception(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @staticmethod
    def _exception(pattern: Mapping[str, Any], module: str, usual: Any) -> Any:
        """As PEFT looks it up: the first pattern that is the module's name or an end of it."""
        return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), usual)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The config in an adapter's folder.

    Raises:
        UserError: there is none, it is not LoRA's, or of a kind that cannot be merged.
    """
    file = folder / ADAPTER_CONFIG
    given = read_adapter_json(folder)
    try:
        config = AdapterConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(f"{file}: {field}: {first['msg']}") from None
    if config.peft_type != "LORA":
        raise UserError(f"{file}: peft_type is {config.peft_type!r}: only LORA is merged")
    for field, reason in NOT_PLAIN.items():
        if given.get(field):
            raise UserError(f"{file}: {field} is {given[field]!r}: {reason}, which cannot be merged into one weight")
    if config.bias != "none":
        raise UserError(f"{file}: bias is {config.bias!r}: it holds biases, for which the network has no place")
    start = str(config.init_lora_weights).lower()
    if start.startswith(CHANGES_BASE):
        raise UserError(
            f"{file}: init_lora_weights is {start!r}, which changed the network's own weights: save the adapter "
            "converted to a plain one (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config
