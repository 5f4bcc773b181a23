"""Registration of the config, the tokenizer, the model and its quantisations with transformers and vLLM.

Runs in every vLLM process (front end, engine core, workers, the registry's inspection subprocess), so it only hands
over names; the classes behind them are imported when a Hunyuan checkpoint is opened.
"""

from __future__ import annotations

import multiprocessing
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_registered = False


def register() -> None:
    """Register everything once a process."""
    global _registered
    if _registered:
        return
    from hunyuan_vllm.vllm_version import check_vllm_version

    check_vllm_version()

    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from hunyuan_vllm import envs
    from hunyuan_vllm.arch_config import HunYuanArchConfigConvertor, HunYuanConfigParser, TransformersPreflight
    from hunyuan_vllm.config import CONFIG_CLASSES, HunYuanConfig
    from hunyuan_vllm.network import ARCHITECTURES
    from hunyuan_vllm.preflight import HunYuanPreflight
    from hunyuan_vllm.quant import register_quantization
    from hunyuan_vllm.ray_environment import limit_copied_variables
    from hunyuan_vllm.tokenizer import register_tokenizer

    AutoConfig.register(HunYuanConfig.model_type, HunYuanConfig, exist_ok=True)
    register_tokenizer()
    register_quantization()
    if envs.limit_ray_variables():
        limit_copied_variables()
    _CONFIG_FORMAT_TO_CONFIG_PARSER["hf"] = HunYuanConfigParser  # `register_config_parser` warns of a format it knows
    model: str | type[nn.Module] = "hunyuan_vllm.model:HunYuanForCausalLM"
    if envs.fork_engine() and multiprocessing.parent_process() is None:
        from hunyuan_vllm.forked_engine import fork_engines
        from hunyuan_vllm.model import HunYuanForCausalLM

        fork_engines()
        model = HunYuanForCausalLM  # by its name, vLLM would look at the class in a process of its own
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, model)
        MODELS_CONFIG_MAP[architecture] = HunYuanPreflight
    for architecture in ("TransformersForCausalLM", "TransformersMoEForCausalLM"):
        MODELS_CONFIG_MAP.setdefault(architecture, TransformersPreflight)
    for model_type in CONFIG_CLASSES:
        MODEL_ARCH_CONFIG_CONVERTORS[model_type] = HunYuanArchConfigConvertor
    ToolParserManager.register_lazy_module("hunyuan_large", "hunyuan_vllm.tool_calls", "HunYuanToolParser")
    ToolParserManager.register_lazy_module("hunyuan_v1", "hunyuan_vllm.tool_calls", "HunYuanV1ToolParser")
    ReasoningParserManager.register_lazy_module("hunyuan_v1", "hunyuan_vllm.reasoning", "HunYuanReasoningParser")
    if "vllm.v1.engine.core" in sys.modules:  # an engine's process, which configures nothing and may build no model
        from hunyuan_vllm.forked_engine import end_with_parent
        from hunyuan_vllm.patches import limit_compilation

        limit_compilation()
        if multiprocessing.current_process().name.startswith("EngineCore"):
            end_with_parent()
    _registered = True
