"""The C++ kernels as operators `torch.ops.hunyuan_vllm.…`: loaded on first use, known to torch.compile.

Their rows are bfloat16. Nothing of Python runs between torch and them.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from vllm.logger import init_logger

from hunyuan_vllm import envs
from hunyuan_vllm.native.build import Unavailable, build, require_features

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name


@cache
def available() -> bool:
    """Whether the operators are there, after compiling them if need be; where not, the log says why, once."""
    if not envs.native_kernels():
        return False
    try:
        require_features()
        _load(str(build(envs.cache_directory() / "kernels")))
    except (Unavailable, OSError) as error:
        logger.warning("No C++ kernels (the model is slow without them): %s", error)
        return False
    return True


@cache
def _load(library: str) -> None:
    torch.ops.load_library(library)
    fakes: dict[str, Callable] = {
        "router_logits": _router_logits,
        "choose_experts": _choose_experts,
        "rotate_and_normalize": _rotate_and_normalize,
        **{f"{scheme}_linear": _linear for scheme in ("w8a16", "w8a8")},
        **{f"{scheme}_experts": _experts for scheme in ("w8a16", "w8a8")},
        "bf16_linear": _bf16_linear,
        "bf16_mlp": _experts,
        "bf16_experts": _experts,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"hunyuan_vllm::{name}", fake)


# The results' shapes, for tensors without data.


def _router_logits(x: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], gate.shape[0], dtype=torch.float32)


def _choose_experts(logits: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], topk)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32)


def _rotate_and_normalize(
    rows: Tensor, positions: Tensor, cos_sin: Tensor, weight: Tensor, heads: int, key_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    tokens, size = rows.shape[0], cos_sin.shape[1]
    return rows.new_empty(tokens, heads * size), rows.new_empty(tokens, key_heads * size)


def _linear(x: Tensor, packed: Tensor, scale: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0])


def _bf16_linear(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


def _experts(hidden: Tensor, *_: object) -> Tensor:
    return hidden.new_empty(hidden.shape)
