"""Linear layers and experts with int8 weights on CPUs, by the kernels that `cpu_kernels.py` chooses.

Plain torch defines what these compute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import silu
from vllm import _custom_ops as ops

from hunyuan_vllm.cpu_kernels import (
    BLOCK_K,
    EXPERTS,
    LINEAR,
    TILE,
    Kernel,
    agrees,
    choices,
    distinct_scales,
    int8_values,
    random_rows,
    small_routes,
    small_size,
)
from hunyuan_vllm.quant.schemes import INT8, INT8_W8A8, Scheme

_BLOCK = 512  # output channels expanded to float32 at a time
_LIBRARY = torch.library.Library("hunyuan_vllm", "FRAGMENT")

Gemm = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x `[tokens, in]`, int8 weight `[out, in]`, float32 scale `[out]`) → float32 `[tokens, out]`."""

SharedExpert = tuple[Tensor, Tensor, Tensor, Tensor]
"""For our kernel, from `pack`: w13, of int8 `[2 · intermediate, hidden]`, w2, of `[hidden, intermediate]`; then their
scales."""

_EXPERTS_ARGUMENTS = (
    "Tensor hidden, Tensor w13, Tensor w2, Tensor w13_scale, Tensor w2_scale, Tensor topk_weights, Tensor topk_ids"
)


class Int8Kernels:
    """Linear layers and SiLU-gated experts with int8 weights.

    A weight is packed once, for the kernel that is chosen for its layer, and is then opaque.

    Args:
        name: the C++ operators' prefix.
        gemm: what is computed, in plain torch.
    """

    def __init__(self, name: str, scheme: Scheme, gemm: Gemm) -> None:
        self.name = name
        self.scheme = scheme
        self.expand_from = dict.fromkeys((LINEAR, EXPERTS), 0)  # our kernels'; see `cpu_kernels.Row`
        self._portable_linear = _define(
            f"{name}_portable_linear",
            "(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
            lambda *tensors: _linear(gemm, *tensors),
            lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
        )
        self._portable_experts = _define(
            f"{name}_portable_experts",
            f"({_EXPERTS_ARGUMENTS}) -> Tensor",
            lambda *tensors: portable_experts(gemm, *tensors),
            lambda hidden, *_: hidden.new_empty(hidden.shape),
        )

    def choose(self, layer: str, dtype: torch.dtype, outputs: int, inputs: int) -> Kernel:
        """The kernel for rows of type `dtype` and weights `[outputs, inputs]`; of experts, w2."""
        if dtype != torch.bfloat16:
            return Kernel.TORCH
        for row in choices(self.scheme, layer):
            if row.kernel is Kernel.OURS:
                self.expand_from[layer] = row.expand_from if row.expand_from and _expansion_agrees(layer) else 0
            if row.kernel is not Kernel.AMX or _amx_multiplies(layer, outputs, inputs):
                return row.kernel
        raise AssertionError

    def pack(self, weight: Tensor, kernel: Kernel) -> Tensor:
        """int8 `[out, in]` or `[experts, out, in]` → what `linear` and `experts` take, to be multiplied by `kernel`."""
        if kernel is Kernel.AMX:
            return torch.ops._C.convert_weight_packed(weight.contiguous())
        if kernel is Kernel.OURS:
            pack = getattr(torch.ops.hunyuan_vllm, f"{self.name}_pack_experts")
            return pack(weight) if weight.ndim == 3 else pack(weight.unsqueeze(0)).squeeze(0)
        return weight.contiguous()

    def linear(self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        """x · (scale ⊙ weight)ᵀ + bias, `[tokens, out]` in x's type.

        Args:
            x: `[tokens, in]`.
            packed: from `pack`, of int8 `[out, in]`.
            scale: float32 `[out]`.
            bias: `[out]`, any floating type.
        """
        bias = None if bias is None else bias.float()
        if packed.dtype == torch.uint8:
            multiply = getattr(torch.ops.hunyuan_vllm, f"{self.name}_linear")
            return multiply(x, packed, scale, bias, self.expand_from[LINEAR])
        if packed.shape[1] != x.shape[1]:
            return _amx_linear(x, packed, scale, bias)
        return self._portable_linear(x, packed, scale, bias)

    def experts(
        self,
        hidden: Tensor,
        w13: Tensor,
        w2: Tensor,
        w13_scale: Tensor,
        w2_scale: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared: SharedExpert | None = None,
    ) -> Tensor:
        """Σ over a token's experts of weight · w2(silu(gate) ⊙ up), `[tokens, hidden]` in hidden's type.

        Args:
            hidden: `[tokens, hidden]`.
            w13, w2: from `pack`, of int8 `[experts, 2 · intermediate, hidden]` (gate's rows, then up's) and
                `[experts, hidden, intermediate]`.
            w13_scale, w2_scale: float32 `[experts, 2 · intermediate]` and `[experts, hidden]`.
            topk_weights, topk_ids: float32 and int32 `[tokens, k]`.
            shared: added with weight 1; for our kernel only.
        """
        tensors = (w13, w2, w13_scale, w2_scale, topk_weights.float().contiguous(), topk_ids.int().contiguous())
        if w13.dtype == torch.uint8:
            multiply = getattr(torch.ops.hunyuan_vllm, f"{self.name}_experts")
            return multiply(hidden, *tensors, *(shared or (None,) * 4), self.expand_from[EXPERTS])
        assert shared is None
        return (_amx_experts if w13.shape[2] != hidden.shape[1] else self._portable_experts)(hidden, *tensors)


def _define(name: str, schema: str, compute: Callable, fake: Callable) -> Callable[..., Tensor]:
    """An operator for CPU tensors, which torch.compile does not look into; `fake` is for tensors without data."""
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, compute, "CPU")
    torch.library.register_fake(f"hunyuan_vllm::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.hunyuan_vllm, name).default


def _w8a16_gemm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    x = x.float()
    product = x.new_empty(len(x), len(weight))
    for start in range(0, len(weight), _BLOCK):
        block = slice(start, start + _BLOCK)
        product[:, block] = x @ weight[block].float().t()
    return product * scale


def _w8a8_gemm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    x = x.float()
    row_scale = x.abs().amax(dim=-1, keepdim=True) / 127
    row_scale = torch.where(row_scale == 0, 1.0, row_scale)
    return torch._int_mm((x / row_scale).round().to(torch.int8), weight.t()) * row_scale * scale


def _linear(gemm: Gemm, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    result = gemm(x, weight, scale)
    return (result if bias is None else result + bias.float()).to(x.dtype)


def portable_experts(
    gemm: Gemm,
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor,
    w2_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    """What lies between the two GEMMs is rounded to hidden's type."""
    output = torch.zeros(hidden.shape, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = gemm(hidden[rows], w13[expert], w13_scale[expert]).chunk(2, dim=-1)
        inner = (silu(gate) * up).to(hidden.dtype)
        down = gemm(inner, w2[expert], w2_scale[expert])
        output.index_add_(0, rows, down * topk_weights[rows, slots, None].float())
    return output.to(hidden.dtype)


w8a16 = Int8Kernels("w8a16", INT8, _w8a16_gemm)
"""int8 weights, activations as they are: sums and scales are float32, nothing else is rounded."""
w8a8 = Int8Kernels("w8a8", INT8_W8A8, _w8a8_gemm)
"""int8 weights, and activations rounded to int8 token by token while computing: sums are integers."""


# int8 rows and weights in vLLM's kernels for AMX. 4 bytes of its own follow each row of weights: `[out, in + 4]`.


def _amx_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    return torch.ops._C.int8_scaled_mm_with_quant(x, packed, scale, bias, x.dtype, True)


def _fused_int8_experts(hidden: Tensor, w13: Tensor, w2: Tensor, *rest: Tensor) -> Tensor:
    w13_scale, w2_scale, topk_weights, topk_ids = rest
    hidden = hidden.contiguous()
    output = torch.empty_like(hidden)
    method, scales = ops.CPUQuantMethod.INT8_W8A8, (w13_scale, w2_scale)
    ops.fused_experts_cpu(output, hidden, w13, w2, topk_weights, topk_ids, method, *scales, None, None, None)
    return output


_amx_experts = _define(
    "w8a8_amx_experts",
    f"({_EXPERTS_ARGUMENTS}) -> Tensor",
    _fused_int8_experts,
    lambda hidden, *_: hidden.new_empty(hidden.shape),
)


def _amx_multiplies(layer: str, outputs: int, inputs: int) -> bool:
    """Whether vLLM's kernels for AMX take such weights (whole tiles only) and multiply them rightly."""
    if outputs % TILE or inputs % TILE:
        return False
    return (_amx_linear_agrees if layer == LINEAR else _amx_experts_agree)(small_size(outputs), small_size(inputs))


@cache
def _amx_linear_agrees(outputs: int, inputs: int) -> bool:
    weight, scale, bias = int8_values(outputs, inputs), distinct_scales(outputs), distinct_scales(outputs)
    return agrees(
        "vLLM's int8_scaled_mm_with_quant",
        random_rows(inputs),
        lambda x: _amx_linear(x, w8a8.pack(weight, Kernel.AMX), scale, bias),
        lambda x: w8a8._portable_linear(x, weight, scale, bias),
    )


@cache
def _amx_experts_agree(hidden: int, width: int) -> bool:
    w13, w2 = int8_values(3, 2 * width, hidden), int8_values(3, hidden, width)
    scales = distinct_scales(3, 2 * width), distinct_scales(3, hidden)
    return agrees(
        "vLLM's fused_experts_cpu (int8)",
        random_rows(hidden),
        lambda x: _amx_experts(x, *(w8a8.pack(w, Kernel.AMX) for w in (w13, w2)), *scales, *small_routes(len(x))),
        lambda x: w8a8._portable_experts(x, w13, w2, *scales, *small_routes(len(x))),
    )


@cache
def _expansion_agrees(layer: str) -> bool:
    """Whether our kernel computes the same of expanded weights."""
    ours, size = torch.ops.hunyuan_vllm, 2 * BLOCK_K
    weights = [w8a16.pack(int8_values(3, *shape), Kernel.OURS) for shape in ((2 * size, size), (size, size))]
    scales = distinct_scales(3, 2 * size), distinct_scales(3, size)

    def multiply(x: Tensor, expand_from: int) -> Tensor:
        if layer == LINEAR:
            return ours.w8a16_linear(x, weights[0][0], scales[0][0], scales[0][1], expand_from)
        route, shared = small_routes(len(x)), (weights[0][1], weights[1][1], scales[0][1], scales[1][1])
        return ours.w8a16_experts(x, *weights, *scales, *route, *shared, expand_from)

    return agrees("expansion of int8 weights", random_rows(size), lambda x: multiply(x, 1), lambda x: multiply(x, 0))
