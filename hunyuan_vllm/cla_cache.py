"""Which layer owns which KV cache.

A CLA group of `cla_share_factor` layers keeps one K (normalised, without weight) and one V: its owner writes them, its
cross layers only read. vLLM's KV sharing does the plumbing; this module decides and checks.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from hunyuan_vllm import envs
from hunyuan_vllm.cache_shape import CacheShape
from hunyuan_vllm.config import HunYuanConfig

__all__ = [
    "OwnerAttention",
    "SharedKV",
    "hand_scales_to_readers",
    "kv_sharing_target",
    "passes_kv",
]

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


def hand_scales_to_readers(model: nn.Module) -> None:
    """Give every cross layer the K and V cache scales of its owner.

    Attention backends dequantise with the reading layer's scales, while the cache was written with the owner's. Called
    after loading; copies in place, so that captured graphs see it.
    """
    attentions = {module.layer_name: module for module in model.modules() if isinstance(module, Attention)}
    for reader in attentions.values():
        if (target := reader.kv_sharing_target_layer_name) is None:
            continue
        owner = attentions[target]
        for which in ("k", "v"):
            getattr(reader, f"_{which}_scale").copy_(getattr(owner, f"_{which}_scale"))
            getattr(reader, f"_{which}_scale_cpu").copy_(getattr(owner, f"_{which}_scale_cpu"))
            setattr(reader, f"_{which}_scale_float", getattr(owner, f"_{which}_scale_float"))


class OwnerAttention(Attention):
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
    shapes = [
        CacheShape.of(
            config,
            tensor_parallel=parallel.tensor_parallel_size,
            stage=stage,
            itemsize=cache.element_size(),
            sharing=sharing,
            dcp=dcp,
        )
        for sharing in (envs.cla_sharing(), False)
    ]
    used, unshared = shapes
    tokens = cache.numel() // (2 * attention.num_kv_heads * attention.head_size) * dcp
    if tokens < vllm_config.model_config.max_model_len:
        return  # a small cache bound for graph profiling; vLLM never serves with less than one full sequence
    logger.info(
        "CLA cache: %d owner layers of %d keep K and V; %.4g KiB a token on each rank (%.4g without sharing); "
        "%d tokens fit",
        used.owners,
        used.layers,
        used.bytes_per_token / 1024,
        unshared.bytes_per_token / 1024,
        tokens,
    )
