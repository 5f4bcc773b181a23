"""What vLLM reads off a config on its own, where a Hunyuan config says it differently."""

from __future__ import annotations

from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from hunyuan_vllm.config import HunYuanConfig

__all__ = ["HunYuanArchConfigConvertor"]


class HunYuanArchConfigConvertor(ModelArchConfigConvertorBase):
    """One expert means a dense layer, and the number of experts may be a list, one value a layer."""

    def get_num_experts(self) -> int:
        """Most routed experts of any layer; 0 for a dense network."""
        config: HunYuanConfig = self.hf_text_config
        experts = max(config.experts_at(layer) for layer in range(config.num_hidden_layers))
        return experts if experts > 1 else 0
