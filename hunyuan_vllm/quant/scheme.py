"""The hook between a quantisation and the loader: which tensors a checkpoint of it holds, and what the model loads.

A quantisation config of ours is a vLLM `QuantizationConfig` and a `CheckpointScheme`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.quantization import QuantizationConfig

__all__ = ["CheckpointScheme", "is_quantised", "layout_of", "scheme_layout"]


class CheckpointScheme(ABC):
    """What the loader asks of a quantisation."""

    @abstractmethod
    def layout(self, config: HunYuanConfig) -> Layout:
        """Names and shapes of the tensors in a checkpoint of this scheme."""

    @abstractmethod
    def load(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        """What the model is to load for a canonical tensor: itself, or what it is converted to.

        `tensor` is whole, not a rank's shard, so that scales taken from it do not depend on the number of ranks.

        Raises:
            CheckpointError: the tensor's values are of no use; the message names it.
        """


def is_quantised(name: str) -> bool:
    """Whether the schemes quantise the tensor of this canonical name: the weight of every attention, MLP and expert
    projection; not the router, norms, embeddings and head."""
    return name.endswith("_proj.weight")


def layout_of(vllm_config: VllmConfig) -> Layout:
    """What the engine's checkpoint should hold.

    Raises:
        UnservedFormat: it is in a format that cannot be loaded.
    """
    from vllm.model_executor.model_loader.weight_utils import get_quant_config

    model_config = vllm_config.model_config
    config: HunYuanConfig = model_config.hf_config
    if model_config.quantization is None:
        return Layout(config)
    # vLLM fills in `vllm_config.quant_config` only after its model hooks have run.
    quant_config = vllm_config.quant_config or get_quant_config(model_config, vllm_config.load_config)
    return scheme_layout(quant_config, config)


def scheme_layout(quant_config: QuantizationConfig | None, config: HunYuanConfig) -> Layout:
    """What a checkpoint that `quant_config` loads holds: as our scheme says, or as config.json does.

    Raises:
        UnservedFormat: it is in a format that cannot be loaded.
    """
    from hunyuan_vllm.quant.formats import quantization_of, stored_format

    if isinstance(quant_config, CheckpointScheme):
        return quant_config.layout(config)
    return stored_format(quantization_of(vars(config))).layout(config)
