"""Which layer owns which KV cache, and with which scales it is written and read where it is FP8.

A CLA group of `cla_share_factor` layers keeps one K (normalised, without weight) and one V: its owner writes them, its
cross layers only read. vLLM's KV sharing does the plumbing; this module decides and checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CacheConfig, get_current_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from hunyuan_vllm import envs
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.cpu_attention import decode_backend
from hunyuan_vllm.kv_cache import CacheShape
from hunyuan_vllm.quant.cpu_fp8 import to_be_truncated
from hunyuan_vllm.quant.fp8 import normalised_key_scale
from hunyuan_vllm.quant.rounding import E4M3_MAX

if TYPE_CHECKING:
    from hunyuan_vllm.quant.fp8 import CacheScales

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name

# k̂ and v of the owner, `[tokens, kv_heads * head_dim]` each, or (None, None) where readers use the cache alone.
SharedKV = tuple[torch.Tensor | None, torch.Tensor | None]


def kv_sharing_target(config: HunYuanConfig, layer: int, attn_name: str) -> str | None:
    """Name of the attention module whose cache layer `layer` reads, or None if it has its own.

    `attn_name` is the layer's own module name, "….layers.<layer>.self_attn.attn".
    """
    if not config.is_cross(layer) or not envs.cla_sharing():
        return None
    head, _, tail = attn_name.rpartition(f".{layer}.")
    return f"{head}.{config.kv_owner(layer)}.{tail}"


def passes_kv() -> bool:
    """Whether cross layers need the owner's k̂ and v of the current tokens beside its cache.

    With sharing off they fill a cache of their own. With decode context parallelism each rank holds only a part of the
    cache, and attention takes the current tokens' K and V from its arguments.
    """
    dcp_size = get_current_vllm_config().parallel_config.decode_context_parallel_size
    return dcp_size > 1 or not envs.cla_sharing()


class CLAAttention(Attention):
    """Attention of one layer of a CLA group, with the right scales for an FP8 cache.

    Attention backends dequantise with the reading layer's scales, while the cache was written with the owner's: readers
    take theirs from their owner. K's follows from the norm where there is one, whatever the checkpoint says; V's is the
    checkpoint's, of the owner layer.

    Args:
        q_amax: the bound of |q| after the norm, where there is one; else None.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        *args: Any,
        cache_config: CacheConfig | None,
        config: HunYuanConfig,
        layer: int,
        q_amax: Callable[[], float] | None,
        **kwargs: Any,
    ) -> None:
        backend = decode_backend(head_size, cache_config.cache_dtype if cache_config else "auto")
        super().__init__(num_heads, head_size, *args, cache_config=cache_config, attn_backend=backend, **kwargs)
        self.config, self.group_owner, self.q_amax = config, config.kv_owner(layer), q_amax
        target = self.kv_sharing_target_layer_name
        attentions = get_current_vllm_config().compilation_config.static_forward_context
        self.__dict__["_owner"] = attentions[target] if target else None  # not as a submodule

    @property
    def is_e4m3(self) -> bool:
        """Whether the cache is FP8 with one static scale for K and one for V."""
        return self.kv_cache_dtype in ("fp8", "fp8_e4m3")

    def forward(
        self, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """vLLM's; on CPUs, what goes into an FP8 cache is rounded to nearest first, which the kernel does not."""
        if self.is_e4m3 and current_platform.is_cpu() and key is not None and value is not None:
            key = to_be_truncated(key, self._k_scale)
            value = to_be_truncated(value, self._v_scale)
        return super().forward(query, key, value, *args, **kwargs)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """vLLM's post-load hook of attention layers, owners first; also runs when weights are reloaded."""
        super().process_weights_after_loading(act_dtype)
        if owner := self.__dict__["_owner"]:
            for name in ("_k_scale", "_v_scale", "_k_scale_cpu", "_v_scale_cpu"):
                getattr(self, name).copy_(getattr(owner, name))
            self._k_scale_float, self._v_scale_float = owner._k_scale_float, owner._v_scale_float
        elif self.is_e4m3:
            self._set_own_scales()
        if self.is_e4m3 and self.q_amax is not None:
            # For backends that quantise queries too: 1, unless the norms' weights are so great that one could saturate.
            _set_scale(self, "q", max(1.0, self.q_amax() / E4M3_MAX))

    def _set_own_scales(self) -> None:
        """Where nothing is known, what vLLM has set stays: 1, or what a quantisation of its own has loaded."""
        given: CacheScales | None = getattr(self.quant_config, "cache_scales", None)
        k, v = (given.k(self.group_owner), given.v(self.group_owner)) if given else (None, None)
        if self.config.use_qk_norm:
            k = normalised_key_scale(self.head_size)
        unknown = []
        for which, scale in (("k", k), ("v", v)):
            if scale is not None:
                _set_scale(self, which, scale)
            elif getattr(self, f"_{which}_scale_float") == 1.0:
                unknown.append(f"{which}_scale")
        if unknown:
            logger.warning_once(
                "FP8 KV cache: the checkpoint has no %s, so the scale is 1: values beyond 448 saturate, and those "
                "below 2^-10 vanish. hunyuan-vllm quantize measures the scales",
                " and ".join(unknown),
            )


def _set_scale(attention: Attention, which: str, scale: float) -> None:
    """Set the scale of "q", "k" or "v" in each form that a backend reads; in place, so that captured graphs see it."""
    setattr(attention, f"_{which}_scale_float", scale)
    for name in (f"_{which}_scale", f"_{which}_scale_cpu"):
        if hasattr(attention, name):
            getattr(attention, name).fill_(scale)


class OwnerAttention(CLAAttention):
    """Attention of an owner layer. The first of an engine says what its cache holds, once vLLM has bound it."""

    @property
    def kv_cache(self) -> torch.Tensor:
        return self.__dict__["_bound_kv_cache"]

    @kv_cache.setter
    def kv_cache(self, cache: torch.Tensor) -> None:
        self.__dict__["_bound_kv_cache"] = cache
        first = get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank
        if first and cache.numel() and ".layers.0." in self.layer_name:
            _report(self, cache)


def _report(attention: Attention, cache: torch.Tensor) -> None:
    vllm_config = get_current_vllm_config()
    config: HunYuanConfig = vllm_config.model_config.hf_config
    parallel = vllm_config.parallel_config
    dcp = parallel.decode_context_parallel_size
    stage = range(*vllm_config.model_config.get_layers_start_end_indices(parallel))
    ranks, itemsize = parallel.tensor_parallel_size, cache.element_size()
    used, unshared = (
        CacheShape.of(config, tensor_parallel=ranks, stage=stage, itemsize=itemsize, sharing=sharing)
        for sharing in (envs.cla_sharing(), False)
    )
    tokens = cache.numel() // (2 * attention.num_kv_heads * attention.head_size) * dcp
    if tokens < vllm_config.model_config.max_model_len:
        return  # a small cache bound for graph profiling; vLLM never serves with less than one full sequence
    logger.info(
        "CLA cache: %d owner layers of %d keep K and V; %.4g KiB per token on each rank (%.4g without sharing); "
        "%d tokens fit",
        used.owners, used.layers, used.bytes_per_token / 1024, unshared.bytes_per_token / 1024, tokens,
    )  # fmt: skip
