"""What all quantisations registered with vLLM share, and the hook between them and the loader"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import Layout
from hunyuan_vllm.quant.quantization_config import quantization_of, stored_format

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class HunYuanQuantization(QuantizationConfig):
    """A quantisation of Hunyuan networks, under a name of its own."""

    name: ClassVar[str]

    # What the loader asks.

    @abstractmethod
    def layout(self, config: HunYuanConfig) -> Layout:
        """Names and shapes of the tensors in a checkpoint of this quantisation."""

    @abstractmethod
    def load(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        """What the model is to load for a canonical tensor: itself, or what it is converted to.

        `tensor` is whole, not a rank's shard, so that scales taken from it do not depend on the number of ranks.

        Raises:
            CheckpointError: the tensor's values cannot be used; the message names it.
        """

    # What vLLM asks.

    def get_name(self) -> str:
        return self.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, *([torch.float32] if current_platform.is_cpu() else [])]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Raises ValueError for a model of another kind, whose loader would not ask us."""
        if not isinstance(hf_config, HunYuanConfig):
            raise ValueError(f"quantization={self.name!r} is for Hunyuan checkpoints; {model_name} is another model")


def add_parameter(
    layer: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, attributes: dict[str, Any]
) -> None:
    """Give a layer an empty parameter with the attributes that vLLM's weight loaders read."""
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    set_weight_attrs(parameter, attributes)
    layer.register_parameter(name, parameter)


def layout_of(vllm_config: VllmConfig) -> Layout:
    """What the engine's checkpoint should hold."""
    from vllm.model_executor.model_loader.weight_utils import get_quant_config

    model_config = vllm_config.model_config
    config: HunYuanConfig = model_config.hf_config
    if model_config.quantization is None:
        return Layout(config)
    # vLLM fills in `vllm_config.quant_config` only after its model hooks have run.
    return loaded_layout(vllm_config.quant_config or get_quant_config(model_config, vllm_config.load_config), config)


def loaded_layout(quant_config: QuantizationConfig | None, config: HunYuanConfig) -> Layout:
    """What a checkpoint that `quant_config` loads holds: as our quantisation says, or as config.json does."""
    if isinstance(quant_config, HunYuanQuantization):
        return quant_config.layout(config)
    return stored_format(quantization_of(vars(config))).layout(config)
