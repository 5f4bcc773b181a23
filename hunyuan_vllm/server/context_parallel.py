"""How many ranks share a sequence's cache: all that hold the same KV head, where the GPUs' attention can."""

from __future__ import annotations

from hunyuan_vllm.plan.attention import choose_backend
from hunyuan_vllm.server.flags import Flags
from hunyuan_vllm.server.machine import GpuKind
from hunyuan_vllm.server.model_source import ModelSource

__all__ = ["choose_context_ranks"]

# With these the user has chosen something that shared caches may not go with.
CHOSEN_OTHERWISE = ("decode-context-parallel-size", "attention-backend", "speculative-config", "kv-transfer-config")


def choose_context_ranks(flags: Flags, gpu: GpuKind | None, model: ModelSource, tensor: int, fp8_cache: bool) -> int:
    """vLLM's --decode-context-parallel-size; 1 where the option is not to be given.

    With more tensor-parallel ranks than KV heads each head is held several times. Those ranks then hold different
    tokens of it instead, and the cache takes as many times the tokens.
    """
    if gpu is None or model.config is None or any(name in flags for name in CHOSEN_OTHERWISE):
        return 1
    copies = tensor // model.config.num_key_value_heads
    if copies <= 1:
        return 1
    backend = choose_backend(gpu, model.config.head_dim, fp8_cache, copies)
    return copies if backend else 1
