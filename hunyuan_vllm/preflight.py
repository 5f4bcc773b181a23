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

from hunyuan_vllm import envs
from hunyuan_vllm.checkpoint import check_headers
from hunyuan_vllm.kv_cache import check_pipeline
from hunyuan_vllm.layout import mlp_widths, tensor_parallel_sizes
from hunyuan_vllm.network import Network
from hunyuan_vllm.quant.formats import OLDER_CPU, UnservedFormat
from hunyuan_vllm.quant.quantization_config import quantization_of, stored_format
from hunyuan_vllm.quant.schemes import INT8, INT8_W8A8
from hunyuan_vllm.ray_environment import join_own_cluster
from hunyuan_vllm.util.errors import UserError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

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
        from vllm.platforms import current_platform

        from hunyuan_vllm.config import CONFIG_CLASSES, HunYuanConfig
        from hunyuan_vllm.cpu import key_compiled_code, limit_targets_on_cpu
        from hunyuan_vllm.cpu_executor import configure_cpu_engine

        config = vllm_config.model_config.hf_config
        if not isinstance(config, HunYuanConfig):
            raise ValueError(f"model_type {config.model_type!r} is not one of {', '.join(CONFIG_CLASSES)}")
        parallel = vllm_config.parallel_config
        check_tensor_parallel(config, parallel.tensor_parallel_size)
        check_pipeline(config, parallel.pipeline_parallel_size)
        if current_platform.is_cpu():
            check_parallel_on_cpus(config, parallel.data_parallel_size, parallel.enable_expert_parallel)
        check_expert_ranks(config, expert_ranks(parallel))
        if speculation := vllm_config.speculative_config:
            check_draft(config, speculation.draft_model_config)
        _check_options(vllm_config)
        if parallel.use_ray or parallel.data_parallel_backend == "ray":
            join_own_cluster()
        check_main_guard()
        check_quantisation(vllm_config)
        limit_targets_on_cpu(vllm_config)
        key_compiled_code(vllm_config)
        configure_cpu_engine(vllm_config)
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


def expert_ranks(parallel: ParallelConfig) -> int:
    """How many ranks share each expert's width: those of all replicas, unless each has whole experts."""
    if parallel.enable_expert_parallel:
        return 1
    return parallel.tensor_parallel_size * parallel.data_parallel_size * parallel.prefill_context_parallel_size


def check_expert_ranks(config: Network, ranks: int) -> None:
    """Every expert's width must divide by the ranks that share it."""
    layers = range(config.num_hidden_layers)
    widths = sorted({config.intermediate_at(layer) for layer in layers if config.experts_at(layer) > 1})
    if any(width % ranks for width in widths):
        raise ValueError(
            f"{ranks} ranks, those of all replicas, share each expert, and its width ({widths}) does not divide by "
            "them: use enable_expert_parallel, or another data_parallel_size"
        )


def check_parallel_on_cpus(config: Network, data_parallel: int, expert_parallel: bool) -> None:
    """What vLLM's experts cannot do there; a dense network's replicas are independent."""
    if data_parallel > 1 and config.has_experts():
        raise ValueError(
            f"data_parallel_size={data_parallel}: replicas of a network with experts exchange tokens, which vLLM "
            "cannot do on CPUs: start as many servers, with a router before them (docs/router.md)"
        )
    if expert_parallel:
        raise ValueError(
            "enable_expert_parallel does not work on CPUs (vLLM's CPU expert kernel ignores the expert map): "
            "use tensor parallelism"
        )


def check_draft(config: Network, draft: ModelConfig | None) -> None:
    """The cache of a draft model lies beside those of the CLA groups, which vLLM allows where all have one shape."""
    if draft is None or not config.use_cla or not envs.cla_sharing():
        return
    own = config.num_key_value_heads, config.head_dim
    if own != (theirs := (draft.get_total_num_kv_heads(), draft.get_head_size())):
        raise ValueError(
            f"speculative_config: the draft has {theirs[0]} KV heads of {theirs[1]}, and this network {own[0]} of "
            f"{own[1]}: vLLM cannot keep another cache beside shared ones; use a draft that was trained for this "
            "network, or method ngram"
        )


def check_main_guard() -> None:
    """A script that starts an engine as it is imported does so again in each process that is spawned, which ends in
    pages of errors. Looked at where vLLM spawns for certain; a script that guards itself in a way unknown here passes.
    """
    from vllm import envs as vllm_envs
    from vllm.platforms import current_platform

    spawns = current_platform.is_cpu() or vllm_envs.VLLM_WORKER_MULTIPROC_METHOD == "spawn"
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    if not vllm_envs.VLLM_ENABLE_V1_MULTIPROCESSING or not spawns or script is None:
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
            after, after,
        )  # fmt: skip


def _check_options(vllm_config: VllmConfig) -> None:
    from vllm.platforms import current_platform

    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise ValueError(
            "kv_sharing_fast_prefill skips the prefill of layers that read another's cache, which is correct only if "
            "they all come last; in a CLA network owners and cross layers alternate: leave it off"
        )
    if vllm_config.parallel_config.decode_context_parallel_size > 1 and current_platform.is_cpu():
        raise ValueError(
            "decode_context_parallel_size needs attention that returns its softmax sums, which CPU attention does not: "
            "leave it at 1"
        )


def _check_files(vllm_config: VllmConfig) -> None:
    from hunyuan_vllm.quant.base import layout_of  # imports vLLM, which `plan` does without

    directory = Path(vllm_config.model_config.model)
    load_format = vllm_config.load_config.load_format
    layout = layout_of(vllm_config)
    if directory.is_dir() and load_format in ("auto", "hf", "safetensors"):
        check_headers(directory, layout)


WORD = 4  # int8 weights in a word of vLLM's weight-only kernels on GPUs
CPU_CACHE_ALIGNMENT = 32  # elements of a head that vLLM's CPU attention takes at a time from an FP8 cache


def check_quantisation(vllm_config: VllmConfig) -> None:
    """Refuse what cannot work."""
    _check_format(vllm_config)
    if vllm_config.model_config.quantization in (INT8.quantization, INT8_W8A8.quantization):
        _check_int8(vllm_config)
    if vllm_config.cache_config.cache_dtype.startswith("fp8"):
        _check_fp8_cache(vllm_config)


def _check_format(vllm_config: VllmConfig) -> None:
    """What vLLM's own quantisations load is bound to hardware, and to ranks that leave whole what has one scale."""
    from vllm.platforms import current_platform

    config: Network = vllm_config.model_config.hf_config
    form = stored_format(quantization_of(vars(config)))
    parallel = vllm_config.parallel_config
    form.check_ranks(config, parallel.tensor_parallel_size, expert_ranks(parallel))
    if current_platform.is_cpu() and (reason := form.cpus or (form.scheme == "int4" and lacks_int4_kernels(config))):
        raise UnservedFormat(form.name, str(reason))


def lacks_int4_kernels(config: Network) -> str:
    """Why this CPU cannot run a network with 4-bit weights; "" if it can."""
    import torch

    runs = torch.cpu._is_amx_tile_supported() if config.has_experts() else torch.cpu._is_avx512_supported()
    return "" if runs else OLDER_CPU


def _check_int8(vllm_config: VllmConfig) -> None:
    from vllm.platforms import current_platform

    model = vllm_config.model_config
    config: Network = model.hf_config
    if config.mlp_bias and config.has_experts():
        raise ValueError(
            f"quantization={model.quantization!r}: int8 experts cannot have biases, but config.json sets mlp_bias: "
            "serve the checkpoint unquantised or in FP8"
        )
    if not current_platform.is_cuda():
        return
    if model.quantization == INT8_W8A8.quantization and current_platform.has_device_capability(100):
        raise ValueError(
            "quantization='hunyuan_int8_w8a8': vLLM's int8 kernels support compute capability up to 9.0, and this GPU "
            "is newer: use 'hunyuan_int8', or an FP8 checkpoint"
        )
    experts = vllm_config.kernel_config.moe_backend
    if model.quantization == INT8.quantization and experts not in ("auto", "marlin"):
        raise ValueError(
            f"moe_backend={experts!r}: quantization='hunyuan_int8' has one scale for each output channel of an expert, "
            "and of vLLM's kernels only Marlin's takes these: use 'auto' or 'marlin'"
        )
    parallel, layers = vllm_config.parallel_config, range(config.num_hidden_layers)
    ranks = parallel.tensor_parallel_size
    sharing = {layer: expert_ranks(parallel) if config.experts_at(layer) > 1 else ranks for layer in layers}
    widths = {config.intermediate_at(layer) // sharing[layer] for layer in layers}
    widths |= {config.hidden_size, config.num_attention_heads * config.head_dim // ranks}
    if model.quantization == INT8.quantization and any(width % WORD for width in widths):
        raise ValueError(
            f"quantization='hunyuan_int8' packs {WORD} inputs in a word, and on a rank layers have "
            f"{sorted(widths)}: use 'hunyuan_int8_w8a8', or another number of ranks"
        )


def _check_fp8_cache(vllm_config: VllmConfig) -> None:
    import torch
    from vllm.platforms import current_platform

    config: Network = vllm_config.model_config.hf_config
    option = f"kv_cache_dtype={vllm_config.cache_config.cache_dtype!r}"
    if current_platform.is_cpu():
        if config.head_dim % CPU_CACHE_ALIGNMENT:
            raise ValueError(
                f"{option}: vLLM's CPU attention has FP8 caches for head sizes that {CPU_CACHE_ALIGNMENT} divides, and "
                f"this network's is {config.head_dim}: use kv_cache_dtype='auto' on CPUs (GPUs take either)"
            )
        if not torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported():
            raise ValueError(f"{option} needs a CPU with AVX-512, and this one has none: use kv_cache_dtype='auto'")
    if skipped := vllm_config.cache_config.kv_cache_dtype_skip_layers:
        for layer in range(config.num_hidden_layers):
            owner = config.kv_owner(layer)
            if (str(layer) in skipped) != (str(owner) in skipped):
                raise ValueError(
                    f"kv_cache_dtype_skip_layers={skipped} gives layer {layer} another cache type than layer {owner}, "
                    "whose cache it reads: name all layers of a CLA group, or none"
                )
