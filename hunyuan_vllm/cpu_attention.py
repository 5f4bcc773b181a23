"""Attention on CPUs without AMX: our kernel computes steps that only decode, vLLM's the others, from the same cache"""

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionLayer
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadata

from hunyuan_vllm.cpu_kernels import ATTENTION, Kernel, kernel
from hunyuan_vllm.quant.schemes import BF16

VECTOR_LAYOUT = "vec"  # what vLLM calls its kernel whose cache ours reads


class DecodeAttentionImpl(CPUAttentionBackendImpl):
    """For bfloat16 decoders without sliding windows, sinks, ALiBi or soft caps."""

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        *args: Tensor | None,
        **kwargs: Tensor | None,
    ) -> Tensor:
        """`query` and `output` are `[tokens, heads, size]`; see vLLM's base class."""
        metadata = attn_metadata
        if (
            metadata is None
            or metadata.max_query_len > 1
            or metadata.num_actual_tokens != len(metadata.seq_lens)
            or layer.isa != VECTOR_LAYOUT
        ):
            return super().forward(layer, query, key, value, kv_cache, metadata, output, *args, **kwargs)
        tokens = metadata.num_actual_tokens
        torch.ops.hunyuan_vllm.decode_attention(
            output[:tokens], query[:tokens], kv_cache, metadata.block_table, metadata.seq_lens, self.scale
        )
        return output


class DecodeAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return DecodeAttentionImpl


def decode_backend(head_size: int, cache_dtype: str) -> type[AttentionBackend] | None:
    """The backend for attention of the model that is being built, or None for vLLM's choice."""
    if not current_platform.is_cpu() or torch.get_default_dtype() != torch.bfloat16 or cache_dtype != "auto":
        return None
    if head_size % 32 or head_size not in CPUAttentionBackend.get_supported_head_sizes():
        return None
    return DecodeAttentionBackend if kernel(BF16, ATTENTION) is Kernel.OURS else None
