"""What all quantisations that we register with vLLM answer alike."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.platforms import current_platform

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.quant.scheme import CheckpointScheme


def is_hunyuan(hf_config: Any) -> bool:
    """Whether a transformers config is of a network that our loader knows."""
    return isinstance(hf_config, HunYuanConfig)


class RegisteredQuantization(QuantizationConfig, CheckpointScheme):
    """A quantisation of Hunyuan networks, under a name of its own."""

    name: ClassVar[str]

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
        if not is_hunyuan(hf_config):
            raise ValueError(
                f"quantization={self.name!r} is for Hunyuan-Large checkpoints; {model_name} is another model"
            )
