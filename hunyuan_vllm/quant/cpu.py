"""Linear layers and experts with quantised weights on CPUs, by the kernels that `cpu_kernels.py` chooses.

Plain torch defines what these compute. Without AMX, FP8 is there to check a GPU's numbers: CPUs have no FP8 arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear
from torch.nn.functional import silu
from vllm import _custom_ops as ops

from hunyuan_vllm.cpu import packs
from hunyuan_vllm.cpu_kernels import EXPERTS, LINEAR, Kernel, agrees, choices, kernel
from hunyuan_vllm.quant.rounding import E4M3, quantize_per_tensor
from hunyuan_vllm.quant.schemes import FP8, INT8, INT8_W8A8, Scheme

_BLOCK = 512  # output channels expanded to float32 at a time
_TILE = 32  # inputs and outputs that AMX's kernels take at a time
_BLOCK_K = 128  # inputs that have one scale in vLLM's FP8 kernels
_TEST_ROWS = 37  # more than a tile of them
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
            lambda *tensors: _experts(gemm, *tensors),
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


def _experts(
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
    if outputs % _TILE or inputs % _TILE:
        return False
    return (_amx_linear_agrees if layer == LINEAR else _amx_experts_agree)(_small(outputs), _small(inputs))


def _small(size: int) -> int:
    """A size for a test, which ends as `size` does."""
    return 2 * _BLOCK_K + size % _BLOCK_K


@cache
def _amx_linear_agrees(outputs: int, inputs: int) -> bool:
    weight, scale, bias = _levels(outputs, inputs), _scales(outputs), _scales(outputs)
    return agrees(
        "vLLM's int8_scaled_mm_with_quant",
        _rows(inputs),
        lambda x: _amx_linear(x, w8a8.pack(weight, Kernel.AMX), scale, bias),
        lambda x: w8a8._portable_linear(x, weight, scale, bias),
    )


@cache
def _amx_experts_agree(hidden: int, width: int) -> bool:
    w13, w2 = _levels(3, 2 * width, hidden), _levels(3, hidden, width)
    scales = _scales(3, 2 * width), _scales(3, hidden)
    return agrees(
        "vLLM's fused_experts_cpu (int8)",
        _rows(hidden),
        lambda x: _amx_experts(x, *(w8a8.pack(w, Kernel.AMX) for w in (w13, w2)), *scales, *_routes(len(x))),
        lambda x: w8a8._portable_experts(x, w13, w2, *scales, *_routes(len(x))),
    )


@cache
def _expansion_agrees(layer: str) -> bool:
    """Whether our kernel computes the same of expanded weights."""
    ours, size = torch.ops.hunyuan_vllm, 2 * _BLOCK_K
    weights = [w8a16.pack(_levels(3, *shape), Kernel.OURS) for shape in ((2 * size, size), (size, size))]
    scales = _scales(3, 2 * size), _scales(3, size)

    def multiply(x: Tensor, expand_from: int) -> Tensor:
        if layer == LINEAR:
            return ours.w8a16_linear(x, weights[0][0], scales[0][0], scales[0][1], expand_from)
        route, shared = _routes(len(x)), (weights[0][1], weights[1][1], scales[0][1], scales[1][1])
        return ours.w8a16_experts(x, *weights, *scales, *route, *shared, expand_from)

    return agrees("expansion of int8 weights", _rows(size), lambda x: multiply(x, 1), lambda x: multiply(x, 0))


def _rows(inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(inputs)
    return torch.randn(_TEST_ROWS, inputs, generator=generator, dtype=torch.bfloat16)


def _levels(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))


def _scales(*shape: int) -> Tensor:
    """Which all differ; models load with another default type than float32."""
    return torch.linspace(1e-3, 2e-3, math.prod(shape), dtype=torch.float32).view(shape)


def _routes(rows: int) -> tuple[Tensor, Tensor]:
    """Of two experts of three: weights and ids; the last expert has one row."""
    ids = torch.zeros(rows, 1, dtype=torch.int32)
    ids[-1] = 2
    return 100 * _scales(rows, 1), ids


# FP8. On CPUs with AMX, vLLM's kernels multiply E4M3 weights with rows as they are. Elsewhere rows are rounded as on
# GPUs, and weights expanded to bfloat16 or float32, in which every E4M3 value is exact: they are as large as
# unquantised ones. Sums are float32; scales are applied to them at the end. (With bfloat16 rows the kernels hand a sum
# over in bfloat16: one more rounding than on a GPU, 2⁻⁹ of the value, where E4M3's own are up to 2⁻⁴.)


def fits_fp8(layer: str, dtype: torch.dtype, outputs: int, inputs: int) -> bool:
    """Whether weights stay E4M3, for vLLM's kernels for AMX: `[outputs, inputs]`, of experts those of w2, no biases."""
    if dtype != torch.bfloat16 or outputs % _TILE or inputs % _TILE or kernel(FP8, layer) is not Kernel.AMX:
        return False
    return (_fp8_linear_agrees if layer == LINEAR else _fp8_experts_agree)(_small(outputs), _small(inputs))


def prepare_fp8(weight: Tensor, dtype: torch.dtype, stays: bool) -> Tensor:
    """E4M3 `[..., out, in]` → what `fp8_linear` and `fp8_experts` take, for a model that computes in `dtype`; scales
    are not applied. float16 models get float32 weights: sums of unscaled values would overflow.

    Args:
        stays: what `fits_fp8` says.
    """
    if stays:
        return torch.ops._C.convert_weight_packed(weight.contiguous())
    expanded = weight.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    outputs, inputs = weight.shape[-2:]
    if packs(outputs, inputs, expanded.dtype):
        return torch.ops._C.convert_weight_packed(expanded)
    return expanded


@cache
def _fp8_linear_agrees(outputs: int, inputs: int) -> bool:
    weight, scale, input_scale = _levels(outputs, inputs).to(E4M3), _scales(outputs), _scales(1)
    return agrees(
        "vLLM's fp8_scaled_mm_cpu",
        _rows(inputs),
        lambda x: fp8_linear(x, prepare_fp8(weight, x.dtype, stays=True), scale, input_scale, None),
        lambda x: x.float() @ (weight.float() * scale.unsqueeze(1)).t(),
    )


@cache
def _fp8_experts_agree(hidden: int, width: int) -> bool:
    weights = [_levels(3, 2 * width, hidden).to(E4M3), _levels(3, hidden, width).to(E4M3)]
    scales, input_scale = [_scales(3), _scales(3).flip(0)], _scales(1)

    def theirs(x: Tensor) -> Tensor:
        packed = (prepare_fp8(weight, x.dtype, stays=True) for weight in weights)
        return fp8_experts(x, *packed, *scales, input_scale, input_scale, None, None, *_routes(len(x)))

    def expected(x: Tensor) -> Tensor:
        plain = (weight.float() for weight in weights)
        by_row = (scale.view(3, 1).expand(weight.shape[:2]) for weight, scale in zip(weights, scales, strict=True))
        tensors = (*plain, *by_row, *_routes(len(x)))
        return _experts(lambda rows, w, scale: rows.float() @ w.t() * scale, x, *tensors)

    return agrees("vLLM's fused_experts_cpu (fp8)", _rows(hidden), theirs, expected)


@torch.library.custom_op("hunyuan_vllm::fp8_linear", mutates_args=())
def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x · (scale ⊙ weight)ᵀ + bias, in x's type.

    Args:
        x: `[..., in]`.
        weight: from `prepare_fp8`, of E4M3 `[out, in]`.
        scale: the weight's, float32 `[out]`.
        input_scale: x's, float32 `[]`.
        bias: `[out]`.
    """
    product = _fp8_gemm(x.reshape(-1, x.shape[-1]), weight, scale, input_scale)
    result = product if bias is None else product + bias.float()
    return result.to(x.dtype).view(*x.shape[:-1], -1)


@fp8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("hunyuan_vllm::fp8_experts", mutates_args=())
def fp8_experts(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor,
    w2_scale: Tensor,
    w13_input_scale: Tensor,
    w2_input_scale: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    """Σ over a token's experts of weight · w2(silu(gate) ⊙ up), `[tokens, hidden]` in hidden's type.

    Args:
        hidden: `[tokens, hidden]`.
        w13, w2: from `prepare_fp8`, of E4M3 `[experts, 2 · intermediate, hidden]` (gate's rows, then up's) and
            `[experts, hidden, intermediate]`.
        w13_scale, w2_scale: the weights', float32 `[experts]`.
        w13_input_scale, w2_input_scale: float32 `[]`, of hidden and of silu(gate) ⊙ up.
        w13_bias, w2_bias: `[experts, 2 · intermediate]` and `[experts, hidden]`.
        topk_weights, topk_ids: `[tokens, k]`.
    """
    if w13.dtype == E4M3:
        return _fused_fp8_experts(hidden.contiguous(), w13, w2, w13_scale, w2_scale, topk_weights, topk_ids)
    output = torch.zeros(hidden.shape, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
        gate_up = _fp8_gemm(hidden[rows], w13[expert], w13_scale[expert], w13_input_scale)
        if w13_bias is not None:
            gate_up += w13_bias[expert]
        gate, up = gate_up.to(hidden.dtype).chunk(2, dim=-1)
        down = _fp8_gemm(silu(gate) * up, w2[expert], w2_scale[expert], w2_input_scale)
        if w2_bias is not None:
            down += w2_bias[expert]
        output.index_add_(0, rows, down * topk_weights[rows, slots, None].float())
    return output.to(hidden.dtype)


@fp8_experts.register_fake
def _(hidden: Tensor, *_: Tensor | None) -> Tensor:
    return torch.empty_like(hidden)


def _fused_fp8_experts(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor,
    w2_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    """One scale for all output channels of an expert, as blocks of vLLM's have it."""
    experts, size, width = w2.shape

    def blocks(scale: Tensor, inputs: int) -> Tensor:
        return scale.view(experts, 1, 1).expand(-1, 1, -(-inputs // _BLOCK_K)).contiguous()

    output = torch.empty_like(hidden)
    ops.fused_experts_cpu(
        output,
        hidden,
        w13,
        w2,
        topk_weights.float().contiguous(),
        topk_ids.int().contiguous(),
        ops.CPUQuantMethod.FP8_W8A16,
        blocks(w13_scale, size),
        blocks(w2_scale, width),
        None,
        None,
        [max(2 * width, size), _BLOCK_K],
    )
    return output


def _fp8_gemm(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor) -> Tensor:
    """float32 `[rows, out]` of x `[rows, in]`."""
    outputs, inputs = weight.shape
    if weight.dtype == E4M3:
        ones = scale.new_ones(1, -(-inputs // _BLOCK_K))
        sums = torch.ops._C.fp8_scaled_mm_cpu(x, weight, ones, [outputs, _BLOCK_K], None, x.dtype, True)
        return sums.float() * scale
    values = quantize_per_tensor(x, input_scale)[0].to(weight.dtype)
    if packs(outputs, inputs, weight.dtype):
        sums = ops.weight_packed_linear_cpu(values, weight, outputs, None)
    else:
        sums = plain_linear(values, weight)
    return sums.float() * (scale * input_scale)


@torch.library.custom_op("hunyuan_vllm::fp8_to_be_truncated", mutates_args=())
def to_be_truncated(x: Tensor, scale: Tensor) -> Tensor:
    """Numbers of which vLLM's CPU kernel stores in an FP8 cache the E4M3 values nearest to `x / scale`.

    The kernel rounds towards zero, which doubles the error that GPUs make. It is given the nearest values, a
    sixty-fourth larger: less than half a step, so that a kernel that rounds to nearest stores the same.
    """
    values, scale = quantize_per_tensor(x, scale)
    return (values.float() * (scale * (1 + 2**-6))).to(x.dtype)


@to_be_truncated.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)
