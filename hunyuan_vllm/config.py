"""The Hunyuan checkpoints' config classes of transformers; fields and checks are in `network`"""

from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from hunyuan_vllm.network import Network, NetworkV1Dense, NetworkV1MoE


class HunYuanConfig(Network, PreTrainedConfig):
    """`model_type` "hunyuan"; see `Network`."""

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    ignore_keys_at_rope_validation = {"alpha"}

    def __new__(cls, *_: Any, **fields: Any) -> "HunYuanConfig":
        """`HunYuanConfig` of a file's fields is of the class that belongs to their `model_type`."""
        kind = CONFIG_CLASSES.get(fields.get("model_type", ""), cls) if cls is HunYuanConfig else cls
        return super().__new__(kind)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As the base class, in the class of the file's `model_type`."""
        fields, _ = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        kind = CONFIG_CLASSES.get(fields.get("model_type", ""), cls)
        return super(HunYuanConfig, kind).from_pretrained(pretrained_model_name_or_path, **kwargs)


class HunYuanV1MoEConfig(NetworkV1MoE, HunYuanConfig):
    """See `NetworkV1MoE`."""


class HunYuanV1DenseConfig(NetworkV1Dense, HunYuanConfig):
    """See `NetworkV1Dense`."""


CONFIG_CLASSES = {kind.model_type: kind for kind in (HunYuanConfig, HunYuanV1MoEConfig, HunYuanV1DenseConfig)}
