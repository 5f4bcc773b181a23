"""How each scheme rounds and stores a weight"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import Shape
from hunyuan_vllm.quant.formats import PACKED, PLAIN
from hunyuan_vllm.quant.layouts import INT8, packed
from hunyuan_vllm.quant.quantization_config import describe
from hunyuan_vllm.quant.rounding import (
    E4M3,
    E4M3_MAX,
    LEVELS,
    pack_int8,
    quantize_per_tensor,
    round_through_fp8,
    unpack_int8,
)
from hunyuan_vllm.util.errors import UserError

ELEMENTS = 1 << 18  # 1 MiB in float32, which stays in a core's cache

T = TypeVar("T")


def in_blocks(matrix: Tensor, work: Callable[[slice], T]) -> list[T]:
    """`work` on slices over the rows of `matrix [rows, columns]`, each of about `ELEMENTS` elements; results in order.

    On a CPU with several threads at once. Torch would share out each operation instead, and make its threads wait for
    each other after every one: with operations this small and other programs on the machine, most of the time.
    """
    rows, columns = matrix.shape
    step = max(1, ELEMENTS // columns)
    slices = [slice(start, start + step) for start in range(0, rows, step)]
    threads = torch.get_num_threads()
    if threads == 1 or len(slices) == 1 or matrix.device.type != "cpu":
        return [work(each) for each in slices]
    torch.set_num_threads(1)  # which the threads of the pool start with
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, slices))
    finally:
        torch.set_num_threads(threads)


MAGNITUDES = 1 << 15
# An FP8 grid repeats itself at every power of two: one above the plain scale, where all weights may fall on a finer
# part of it, and below as many as an outlier may be worth giving up for.
FP8_STEPS, FP8_POWERS = 32, range(-12, 2)
INT8_SHRINKS = [1 - 0.025 * step for step in range(29)]  # of the largest weight of a row, down to 0.3


def tensor_scale(weights: Iterable[Tensor], clip: str) -> float:
    """One E4M3 scale for all of `weights` together, any shapes; 1 where all are zero."""
    if clip == "max":
        return (max(float(_amax(weight)) for weight in weights) / E4M3_MAX) or 1.0
    counts = torch.stack([_histogram(weight) for weight in weights]).sum(0)
    magnitudes = torch.arange(MAGNITUDES, dtype=torch.int16).view(torch.bfloat16).float()
    used = counts.nonzero()[:, 0]
    counts, magnitudes = counts[used], magnitudes[used]
    if not magnitudes[-1]:
        return 1.0
    return _least_error(magnitudes, counts.double())


def row_scales(weight: Tensor, clip: str) -> Tensor:
    """An int8 scale for each row of `weight [out, in]`, float32 `[out, 1]`; 1 for a row of zeros."""
    chosen = torch.cat(in_blocks(weight, lambda rows: _largest(weight[rows].float(), clip)))
    scale = chosen / LEVELS
    return torch.where(scale == 0, 1.0, scale)


def _largest(rows: Tensor, clip: str) -> Tensor:
    """The largest magnitude of each row that is still to be represented, `[rows, 1]`."""
    magnitudes = rows.abs()
    amax = magnitudes.amax(dim=1, keepdim=True)
    if clip == "max":
        return amax
    best, least = amax, torch.full_like(amax, math.inf)
    for shrink in INT8_SHRINKS:
        scale = torch.where(amax == 0, 1.0, amax * shrink / LEVELS)
        levels = (magnitudes / scale).round_().clamp_(max=LEVELS)
        error = levels.mul_(scale).sub_(magnitudes).square_().sum(dim=1, keepdim=True)
        best = torch.where(error < least, amax * shrink, best)
        least = torch.minimum(error, least)
    return best


def _least_error(magnitudes: Tensor, counts: Tensor) -> float:
    widest = float(magnitudes[-1]) / E4M3_MAX
    steps = range(FP8_STEPS * FP8_POWERS.start, FP8_STEPS * (FP8_POWERS.stop - 1))
    scales = [widest * 2.0 ** (step / FP8_STEPS) for step in steps]
    errors = [((round_through_fp8(magnitudes, s) - magnitudes).double().square() * counts).sum().item() for s in scales]
    return scales[errors.index(min(errors))]


def _amax(weight: Tensor) -> Tensor:
    least, most = weight.aminmax()
    return torch.maximum(-least, most)


def _histogram(weight: Tensor) -> Tensor:
    """How often each bfloat16 magnitude occurs, int64 `[32768]`, on the CPU."""

    def count(rows: slice) -> Tensor:
        bits = weight[rows].bfloat16().view(torch.int16).bitwise_and(MAGNITUDES - 1)
        return bits.flatten().bincount(minlength=MAGNITUDES)

    return torch.stack(in_blocks(weight, count)).sum(0).cpu()


INT8_DTYPES = {"weight": torch.int8, "weight_packed": torch.int32, "weight_scale": torch.float32}
Stored = Mapping[str, Tensor]
"""The tensors that stand for one weight, or for some rows of it, by the last part of their names."""


@dataclass(frozen=True)
class Spec:
    """A tensor of the written checkpoint."""

    name: str
    dtype: torch.dtype
    shape: Shape


class Scheme(ABC):
    """A format. What it stores with two dimensions has the weight's rows.

    Attributes:
        name: what --scheme calls it.
        static_inputs: whether a projection has an `input_scale`, which calibration gives.
    """

    name: ClassVar[str]
    static_inputs: ClassVar[bool] = False

    @abstractmethod
    def specs(self, projection: str, shape: Shape) -> list[Spec]:
        """The tensors that stand for the weight `[out, in]` of a projection, under their whole names."""

    @abstractmethod
    def encode(self, weights: Sequence[Tensor], clip: str) -> list[dict[str, Tensor]]:
        """The tensors that stand for each weight of a fused projection, without the input scale."""

    @abstractmethod
    def decode(self, stored: Stored) -> Tensor:
        """The weight that is stood for, float32 `[out, in]`."""

    @abstractmethod
    def at_limit(self, stored: Stored) -> Tensor:
        """Which weights lie at the end of the range, boolean `[out, in]`."""

    @abstractmethod
    def half_step(self, weight: Tensor, stored: Stored) -> Tensor:
        """Most that rounding may move a weight within the range; broadcasts against `[out, in]`."""

    @abstractmethod
    def as_served(self, inputs: Tensor, stored: Stored) -> Tensor:
        """Inputs `[tokens, in]` as the engine's kernels see them."""

    @abstractmethod
    def config(self, kept: Sequence[str]) -> dict[str, Any]:
        """config.json's quantization_config; `kept` names the linear layers that are not quantised."""

    @abstractmethod
    def check(self, config: HunYuanConfig) -> None:
        """Refuse a network that the format has no room for.

        Raises:
            UserError: names the field.
        """


class Fp8(Scheme):
    """E4M3 weights and inputs, one scale a tensor; the weights of a fused projection share theirs."""

    name = "fp8"
    static_inputs = True

    def specs(self, projection: str, shape: Shape) -> list[Spec]:
        return [
            Spec(f"{projection}.weight", E4M3, shape),
            Spec(f"{projection}.weight_scale", torch.float32, ()),
            Spec(f"{projection}.input_scale", torch.float32, ()),
        ]

    def encode(self, weights: Sequence[Tensor], clip: str) -> list[dict[str, Tensor]]:
        scale = torch.tensor(tensor_scale(weights, clip))
        return [
            {"weight": _by_rows(weight, E4M3, lambda w, rows: quantize_per_tensor(w, scale)[0]), "weight_scale": scale}
            for weight in weights
        ]

    def decode(self, stored: Stored) -> Tensor:
        return _expand(stored["weight"]) * stored["weight_scale"]

    def at_limit(self, stored: Stored) -> Tensor:
        return stored["weight"].view(torch.int8).bitwise_and(0x7F) == 0x7E  # ±448

    def half_step(self, weight: Tensor, stored: Stored) -> Tensor:
        # 3 bits of mantissa: at most 1/16 of the value, or of the least normal one, 2⁻⁶.
        return torch.maximum(weight.abs() / 16, stored["weight_scale"] * 2.0**-10)

    def as_served(self, inputs: Tensor, stored: Stored) -> Tensor:
        return round_through_fp8(inputs, stored["input_scale"])

    def config(self, kept: Sequence[str]) -> dict[str, Any]:
        return {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": list(kept)}

    def check(self, config: HunYuanConfig) -> None:
        """Any network fits."""


class _CompressedInt8(Scheme):
    """int8 weights, one scale an output channel."""

    form: ClassVar[str]

    def specs(self, projection: str, shape: Shape) -> list[Spec]:
        stored = (INT8 if self.form == PLAIN else packed(8)).tensors(*shape)
        return [Spec(f"{projection}.{part}", INT8_DTYPES[part], held) for part, (held, _) in stored.items()]

    def encode(self, weights: Sequence[Tensor], clip: str) -> list[dict[str, Tensor]]:
        return [self._encode(weight, clip) for weight in weights]

    def _encode(self, weight: Tensor, clip: str) -> dict[str, Tensor]:
        scale = row_scales(weight, clip)
        levels = _by_rows(weight, torch.int8, lambda w, rows: (w / scale[rows]).round_().clamp_(-LEVELS, LEVELS))
        return self._pack(levels) | {"weight_scale": scale}

    def decode(self, stored: Stored) -> Tensor:
        return self._levels(stored).float() * stored["weight_scale"]

    def at_limit(self, stored: Stored) -> Tensor:
        return self._levels(stored).abs() == LEVELS

    def half_step(self, weight: Tensor, stored: Stored) -> Tensor:
        return stored["weight_scale"] / 2

    def config(self, kept: Sequence[str]) -> dict[str, Any]:
        return describe(self.form, kept)

    @abstractmethod
    def _pack(self, levels: Tensor) -> dict[str, Tensor]:
        """What is stored for int8 `[out, in]`."""

    @abstractmethod
    def _levels(self, stored: Stored) -> Tensor:
        """The inverse of `_pack`."""


class Int8(_CompressedInt8):
    """Weight-only, four weights in an int32."""

    name, form = "int8", PACKED

    def specs(self, projection: str, shape: Shape) -> list[Spec]:
        # Readers other than ours need the shape: rows may have been padded to whole int32.
        return [*super().specs(projection, shape), Spec(f"{projection}.weight_shape", torch.int64, (2,))]

    def as_served(self, inputs: Tensor, stored: Stored) -> Tensor:
        return inputs

    def check(self, config: HunYuanConfig) -> None:
        widths = {
            "hidden_size": config.hidden_size,
            "num_attention_heads * head_dim": config.num_attention_heads * config.head_dim,
        }
        for layer in range(config.num_hidden_layers):
            widths[f"intermediate_size of layer {layer}"] = config.intermediate_at(layer)
        for field, width in widths.items():
            if width % 4:
                raise UserError(
                    f"--scheme int8 packs four inputs into a word, and {field} is {width}, no multiple of 4: "
                    "use --scheme int8-w8a8"
                )

    def _pack(self, levels: Tensor) -> dict[str, Tensor]:
        return {"weight_packed": pack_int8(levels), "weight_shape": torch.tensor(levels.shape)}

    def _levels(self, stored: Stored) -> Tensor:
        return unpack_int8(stored["weight_packed"], int(stored["weight_shape"][1]))


class Int8W8A8(_CompressedInt8):
    """Inputs are int8 too: one scale a token, taken while serving."""

    name, form = "int8-w8a8", PLAIN

    def as_served(self, inputs: Tensor, stored: Stored) -> Tensor:
        scale = row_scales(inputs, "max")
        return (inputs / scale).round_().clamp_(-LEVELS, LEVELS).mul_(scale)

    def check(self, config: HunYuanConfig) -> None:
        """Any network fits."""

    def _pack(self, levels: Tensor) -> dict[str, Tensor]:
        return {"weight": levels}

    def _levels(self, stored: Stored) -> Tensor:
        return stored["weight"]


def scheme_named(name: str) -> Scheme:
    """The scheme that --scheme names, one of `quant.schemes.WRITTEN`."""
    schemes: tuple[Scheme, ...] = (Fp8(), Int8(), Int8W8A8())
    return {scheme.name: scheme for scheme in schemes}[name]


def _expand(values: Tensor) -> Tensor:
    """E4M3 in float32, five times as fast as torch's own cast on a CPU: sign, exponent and mantissa are moved to where
    float32 has its own, and the exponents' biases, 7 and 127, lie 2¹²⁰ apart. (E4M3's NaN becomes 480, in no range.)"""
    bits = values.view(torch.int8).int()  # its sign is carried up to the highest bit
    return ((bits & 0x7F) << 20 | bits & -(1 << 31)).view(torch.float32) * 2.0**120


def _by_rows(weight: Tensor, dtype: torch.dtype, encode: Callable[[Tensor, slice], Tensor]) -> Tensor:
    encoded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    in_blocks(weight, lambda rows: encoded[rows].copy_(encode(weight[rows], rows)))
    return encoded
