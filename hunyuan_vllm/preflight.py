"""What can be known to fail before an engine starts: parallel sizes, pipeline cuts, options and checkpoint files.

vLLM calls the hook in the user's own process, so an error arrives there, as one message, before any worker exists.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from hunyuan_vllm.checkpoint import check_headers
from hunyuan_vllm.kv_cache import check_pipeline
from hunyuan_vllm.layout import mlp_widths, tensor_parallel_sizes
from hunyuan_vllm.network import Network
from hunyuan_vllm.quant.preflight import check_quantisation
from hunyuan_vllm.ray_environment import join_own_cluster
from hunyuan_vllm.util.errors import UserError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name


class HunYuanPreflight:
    """vLLM's per-architecture config hook (`vllm.model_executor.models.config.VerifyAndUpdateConfig`)."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Make temperature 0 the default where `do_sample` is false, which vLLM does not read."""
        given = model_config.override_generation_config
        stored = {} if model_config.generation_config == "vllm" else model_config.try_get_generation_config()
        if (stored | given).get("do_sample") is False and "temperature" not in given:
            model_config.override_generation_config = given | {"temperature": 0.0}
        if model_config.generation_config == "auto" and "max_new_tokens" not in given:
            _warn_of_max_new_tokens(stored.get("max_new_tokens"))

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: the message names the option and what to use instead.
            CheckpointError: a checkpoint file or tensor is wrong.
            UserError: the script that makes the engine would make another in each of the engine's processes.
        """
        # These bring vLLM and transformers, which the checks below do without.
        from hunyuan_vllm.config import CONFIG_CLASSES, HunYuanConfig
        from hunyuan_vllm.cpu import key_compiled_code, limit_targets_on_cpu
        from hunyuan_vllm.cpu_executor import run_in_engine_process

        config = vllm_config.model_config.hf_config
        if not isinstance(config, HunYuanConfig):
            raise ValueError(f"model_type {config.model_type!r} is not one of {', '.join(CONFIG_CLASSES)}")
        parallel = vllm_config.parallel_config
        check_tensor_parallel(config, parallel.tensor_parallel_size)
        check_pipeline(config, parallel.pipeline_parallel_size)
        _check_options(vllm_config)
        if parallel.use_ray or parallel.data_parallel_backend == "ray":
            join_own_cluster()
        check_main_guard()
        check_quantisation(vllm_config)
        limit_targets_on_cpu(vllm_config)
        key_compiled_code(vllm_config)
        run_in_engine_process(vllm_config)
        from hunyuan_vllm.patches import check_adapters_of_requests, limit_compilation

        limit_compilation()
        if vllm_config.lora_config is not None:
            check_adapters_of_requests()
        _check_files(vllm_config)


def check_tensor_parallel(config: Network, size: int) -> None:
    """Query heads and every MLP width must divide by the tensor-parallel size; KV heads may also be replicated."""
    if size not in (sizes := tensor_parallel_sizes(config)):
        widths = sorted(mlp_widths(config))
        raise ValueError(
            f"tensor_parallel_size={size} does not divide this network (num_attention_heads "
            f"{config.num_attention_heads}, num_key_value_heads {config.num_key_value_heads}, intermediate_size "
            f"{widths}): use one of {sizes}"
        )


def check_main_guard() -> None:
    """A script that starts an engine as it is imported does so again in each process that is spawned, which ends in
    pages of errors. Looked at where vLLM spawns for certain; a script that guards itself in a way unknown here passes.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    spawns = current_platform.is_cpu() or envs.VLLM_WORKER_MULTIPROC_METHOD == "spawn"
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    if not envs.VLLM_ENABLE_V1_MULTIPROCESSING or not spawns or script is None:
        return
    frame: FrameType | None = sys._getframe()
    while frame is not None and not (frame.f_globals is vars(main) and frame.f_code.co_name == "<module>"):
        frame = frame.f_back
    try:
        source = Path(script).read_text()
    except (OSError, ValueError):
        return
    if frame is not None and not re.search(r"\bif\b.*__name__|parent_process|current_process", source):
        raise UserError(
            f"{os.path.basename(script)} makes its engine on import, and the engine's processes import it again: "
            f'put `if __name__ == "__main__":` before line {frame.f_lineno}, and the lines from there below it'
        )


@cache
def _warn_of_max_new_tokens(after: int | None) -> None:
    if after is not None:
        logger.warning(
            "generation_config.json has max_new_tokens %s: answers end after %s tokens unless a request says "
            "otherwise; --override-generation-config '{\"max_new_tokens\": null}' takes this default away",
            after,
            after,
        )


def _check_options(vllm_config: VllmConfig) -> None:
    from vllm.platforms import current_platform

    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise ValueError(
            "kv_sharing_fast_prefill skips the prefill of layers that read another's cache, which is right only where "
            "they all come last; in a CLA network owners and cross layers alternate: leave it off"
        )
    if vllm_config.parallel_config.decode_context_parallel_size > 1 and current_platform.is_cpu():
        raise ValueError(
            "decode_context_parallel_size needs attention that returns its softmax sums, which CPU attention does not: "
            "leave it at 1"
        )
    if vllm_config.parallel_config.enable_expert_parallel and current_platform.is_cpu():
        raise ValueError(
            "enable_expert_parallel does not work on CPUs (vLLM's CPU expert kernel ignores the expert map): "
            "use tensor parallelism"
        )


def _check_files(vllm_config: VllmConfig) -> None:
    from hunyuan_vllm.quant.base import layout_of  # imports vLLM, which `plan` does without

    folder = Path(vllm_config.model_config.model)
    load_format = vllm_config.load_config.load_format
    layout = layout_of(vllm_config)
    if folder.is_dir() and load_format in ("auto", "hf", "safetensors"):
        check_headers(folder, layout)
