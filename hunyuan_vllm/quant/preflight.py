"""What can be known, before an engine starts, not to work with a quantised checkpoint or cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hunyuan_vllm.network import Network
from hunyuan_vllm.quant.formats import OLDER_CPU, UnservedFormat
from hunyuan_vllm.quant.quantization_config import quantization_of, stored_format
from hunyuan_vllm.quant.schemes import INT8, INT8_W8A8

if TYPE_CHECKING:
    from vllm.config import VllmConfig

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
    form.check_ranks(config, vllm_config.parallel_config.tensor_parallel_size)
    if current_platform.is_cpu() and (reason := form.cpus or (form.scheme == "int4" and lacks_int4_kernels(config))):
        raise UnservedFormat(form.name, str(reason))


def lacks_int4_kernels(config: Network) -> str:
    """Why this CPU cannot run a network with 4-bit weights; "" if it can."""
    import torch

    has_experts = any(config.experts_at(layer) > 1 for layer in range(config.num_hidden_layers))
    runs = torch.cpu._is_amx_tile_supported() if has_experts else torch.cpu._is_avx512_supported()
    return "" if runs else OLDER_CPU


def _check_int8(vllm_config: VllmConfig) -> None:
    from vllm.platforms import current_platform

    model = vllm_config.model_config
    config: Network = model.hf_config
    if config.mlp_bias and any(config.experts_at(layer) > 1 for layer in range(config.num_hidden_layers)):
        raise ValueError(
            f"quantization={model.quantization!r}: int8 experts have no biases, and config.json says mlp_bias: serve "
            "the checkpoint unquantised or in FP8"
        )
    if not current_platform.is_cuda():
        return
    if model.quantization == INT8_W8A8.quantization and current_platform.has_device_capability(100):
        raise ValueError(
            "quantization='hunyuan_int8_w8a8': vLLM's int8 kernels end with compute capability 9.0, and this GPU is "
            "newer: use 'hunyuan_int8', or an FP8 checkpoint"
        )
    experts = vllm_config.kernel_config.moe_backend
    if model.quantization == INT8.quantization and experts not in ("auto", "marlin"):
        raise ValueError(
            f"moe_backend={experts!r}: quantization='hunyuan_int8' has one scale for each output channel of an expert, "
            "and of vLLM's kernels only Marlin's takes these: use 'auto' or 'marlin'"
        )
    ranks = vllm_config.parallel_config.tensor_parallel_size
    widths = {config.intermediate_at(layer) // ranks for layer in range(config.num_hidden_layers)}
    widths |= {config.hidden_size, config.num_attention_heads * config.head_dim // ranks}
    if model.quantization == INT8.quantization and any(width % WORD for width in widths):
        raise ValueError(
            f"quantization='hunyuan_int8' packs {WORD} inputs in a word, and on {ranks} ranks layers have "
            f"{sorted(widths)}: use 'hunyuan_int8_w8a8', or another tensor_parallel_size"
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
