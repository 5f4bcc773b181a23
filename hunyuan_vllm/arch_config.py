"""How vLLM reads the config.json of a Hunyuan checkpoint, and what it then derives from the config"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants
from transformers import CONFIG_MAPPING, PreTrainedConfig
from vllm.transformers_utils.config import HFConfigParser
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from hunyuan_vllm.config import CONFIG_CLASSES, HunYuanConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


class HunYuanConfigParser(HFConfigParser):
    """vLLM's parser of config.json, but every Hunyuan checkpoint gets our config class.

    transformers has classes of its own for the V1 model types, and keeps them: vLLM's registry of config classes would
    replace them in the whole process.
    """

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict, PreTrainedConfig]:
        hub = {name: value for name, value in kwargs.items() if name not in ("hf_overrides", "trust_remote_code")}
        hub |= {"revision": revision, "local_files_only": huggingface_hub.constants.HF_HUB_OFFLINE}
        try:
            fields, _ = PreTrainedConfig.get_config_dict(model, **hub)
        except Exception:  # vLLM's own parser raises it again, or reads what this cannot
            fields = {}
        if fields.get("model_type") not in CONFIG_CLASSES:
            return super().parse(model, trust_remote_code, revision, code_revision, **kwargs)
        config = HunYuanConfig.from_dict(fields, name_or_path=str(model))
        if config.longest_context > config.max_position_embeddings:
            config.model_max_length = config.longest_context  # vLLM's limit of --max-model-len
        return fields, config


class HunYuanArchConfigConvertor(ModelArchConfigConvertorBase):
    """One expert means a dense layer, and the number of experts may be a list, one value a layer."""

    def get_num_experts(self) -> int:
        """Most routed experts of any layer; 0 for a dense network."""
        config = self.hf_text_config
        if isinstance(config, HunYuanConfig):
            experts = max(config.experts_at(layer) for layer in range(config.num_hidden_layers))
        else:
            experts = super().get_num_experts()
        return experts if experts > 1 else 0

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        """The default of --max-model-len; `model_max_length` is what may be asked for."""
        return self.hf_text_config.max_position_embeddings, "max_position_embeddings"


class TransformersPreflight:
    """vLLM's config hook of its Transformers backend (`--model-impl transformers`), which other models have too.

    It needs transformers' own config class, which vLLM's parser no longer makes of a Hunyuan checkpoint.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Give a V1 checkpoint the config class of transformers.

        Raises:
            ValueError: transformers has none for this model_type.
        """
        config = model_config.hf_config
        if not isinstance(config, HunYuanConfig):
            return
        if config.model_type not in CONFIG_MAPPING or config.model_type == HunYuanConfig.model_type:
            raise ValueError(
                f"--model-impl transformers: transformers has no model of model_type {config.model_type!r}: "
                "leave the option out"
            )
        fields, _ = PreTrainedConfig.get_config_dict(model_config.hf_config_path or model_config.model)
        theirs = CONFIG_MAPPING[config.model_type].from_dict(fields | {"head_dim": config.head_dim})
        model_config.hf_config = model_config.hf_text_config = theirs
        model_config.model_arch_config = model_config.get_model_arch_config()

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Nothing more."""
