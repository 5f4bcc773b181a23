"""How many tokens each expert of each layer has been given: counted by workers, fetched by the server's /metrics.

vLLM has a hook for it and no metric. Counting costs one small kernel a layer and step, so it is on only where
the worker extension below is asked for: `hunyuan-vllm serve --expert-load`.
"""

import re
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.envs import VLLM_MOE_SKIP_PADDING
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

EXTENSION = "hunyuan_vllm.expert_load.ExpertLoad"
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

Loads = dict[int, list[int]]  # layer → tokens given to each expert


class _Count:
    """A router's callback: counts the rows that are tokens of a request.

    A batch may be filled up to the size of a CUDA graph, and engines of a data-parallel group that have nothing to do
    run batches of such rows alone. Adds in place and branches on no value, so that it may be part of a graph.
    """

    def __init__(self, experts: int) -> None:
        self.tokens = torch.zeros(experts, dtype=torch.int64)  # on the device that the model is built on

    def __call__(self, chosen: Tensor) -> None:
        """`chosen` is [tokens, top k]."""
        counted = chosen >= 0  # vLLM's kernels on GPUs choose -1 for a row of padding
        padding = _padding()
        if padding is not None and len(padding) == len(chosen):
            counted &= ~padding.unsqueeze(1)
        self.tokens.index_add_(0, chosen.clamp(min=0).flatten().long(), counted.flatten().long())


def _padding() -> Tensor | None:
    """Which rows of the batch are padding, where the model runner says so: vLLM's buffer, filled before each step."""
    if not VLLM_MOE_SKIP_PADDING or not is_forward_context_available():
        return None  # without the variable, Model Runner V2 leaves the buffer as it was
    return get_forward_context().is_padding


def count_expert_load(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Have the routers of `model` count, if this worker is one that is asked for counts."""
    if vllm_config.parallel_config.worker_extension_cls != EXTENSION:
        return
    for module in model.modules():
        router = getattr(module, "router", None)
        if isinstance(router, BaseRouter):
            router.set_capture_fn(_Count(router.global_num_experts))


class ExpertLoad:
    """Methods of every worker, for `collective_rpc`."""

    get_model: Callable[[], Any]  # the worker's

    def expert_load(self, reset: bool = False) -> Loads:
        """The counts of this worker's layers; none from ranks that route as another does.

        Args:
            reset: count from zero from now on: a start runs tokens of no request.
        """
        counts: dict[int, Tensor] = {}
        for name, module in self.get_model().named_modules():
            router = getattr(module, "router", None)
            count = router.capture_fn if isinstance(router, BaseRouter) else None
            layer = LAYER.search(f"{name}.")
            if isinstance(count, _Count) and layer:
                if reset:
                    count.tokens.zero_()
                counts[int(layer[1])] = count.tokens
        if not counts or get_tensor_model_parallel_rank() != 0:
            return {}
        flat = iter(torch.cat(list(counts.values())).tolist())  # one copy from the device, while the engine waits
        return {layer: list(islice(flat, len(tokens))) for layer, tokens in counts.items()}
