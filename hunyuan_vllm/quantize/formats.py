"""How each scheme rounds and stores a weight"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from hunyuan_vllm.layout import Shape
from hunyuan_vllm.network import Network
from hunyuan_vllm.quant.formats import PACKED, PLAIN, Format
from hunyuan_vllm.quant.layouts import E4M3_NAME, IgnoredLayers
from hunyuan_vllm.quant.quantization_config import describe, int8, static_fp8
from hunyuan_vllm.quant.rounding import (
    E4M3,
    E4M3_MAX,
    pack_int8,
    quantize_per_channel,
    quantize_per_tensor,
    round_through_fp8,
    unpack_int8,
)
from hunyuan_vllm.quantize.source import Unit
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


TORCH_TYPES = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "F32": torch.float32, E4M3_NAME: E4M3}
Stored = Mapping[str, Tensor]
"""The tensors that stand for one weight, or for some rows of it, by the last part of their names."""


@dataclass(frozen=True)
class Spec:
    """A tensor of the written checkpoint."""

    name: str
    dtype: torch.dtype
    shape: Shape


class WeightFormat(ABC):
    """How a scheme stores weights: scales reach to the largest, so that none saturates. What it stores with two
    dimensions has the weight's rows.

    Attributes:
        format: as readers know it.
        static_inputs: whether a projection has an `input_scale`, which calibration gives.
        word: inputs that are packed together.
    """

    format: ClassVar[Format]
    static_inputs: ClassVar[bool] = False
    word: ClassVar[int] = 1

    def specs(self, projection: str, shape: Shape) -> list[Spec]:
        """The tensors that stand for the weight `[out, in]` of a projection, under their whole names."""
        assert self.format.stored is not None
        stored = self.format.stored(projection)
        tensors = stored.tensors(*shape) | stored.optional(*shape)
        return [Spec(f"{projection}.{part}", TORCH_TYPES[types[-1]], held) for part, (held, types) in tensors.items()]

    @abstractmethod
    def encode(self, weights: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The tensors that stand for each weight of a fused projection, without the input scale."""

    @abstractmethod
    def decode(self, stored: Stored) -> Tensor:
        """The weight that is stood for, float32 `[out, in]`."""

    @abstractmethod
    def half_step(self, weight: Tensor, stored: Stored) -> Tensor:
        """The most that rounding may move a weight; broadcasts against `[out, in]`."""

    @abstractmethod
    def as_served(self, inputs: Tensor, stored: Stored) -> Tensor:
        """Inputs `[tokens, in]` as the engine's kernels see them."""

    @abstractmethod
    def config(self, kept: Sequence[str]) -> dict[str, Any]:
        """config.json's quantization_config; `kept` names the linear layers that are not quantised."""

    def check(self, config: Network) -> None:
        """Refuse a network that the format has no room for."""
        widths = {
            "hidden_size": config.hidden_size,
            "num_attention_heads * head_dim": config.num_attention_heads * config.head_dim,
        }
        for layer in range(config.num_hidden_layers):
            widths[f"intermediate_size of layer {layer}"] = config.intermediate_at(layer)
        for field, width in widths.items():
            if width % self.word:
                raise UserError(
                    f"--scheme int8 packs {self.word} inputs into a word, and {field} is {width}, which is not a "
                    f"multiple of {self.word}: use --scheme int8-w8a8"
                )


class Fp8(WeightFormat):
    """E4M3 weights and inputs, one scale per tensor; the weights of a fused projection share theirs."""

    format = static_fp8(IgnoredLayers())
    static_inputs = True

    def encode(self, weights: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        largest = max(float(bound.abs()) for weight in weights for bound in weight.aminmax())
        scale = torch.tensor(largest / E4M3_MAX or 1.0)

        def rounded(weight: Tensor) -> Tensor:
            return torch.cat(in_blocks(weight, lambda rows: quantize_per_tensor(weight[rows], scale)[0]))

        return [{"weight": rounded(weight), "weight_scale": scale} for weight in weights]

    def decode(self, stored: Stored) -> Tensor:
        return stored["weight"].float() * stored["weight_scale"]

    def half_step(self, weight: Tensor, stored: Stored) -> Tensor:
        # 3 bits of mantissa: at most 1/16 of the value, or of the smallest normal one, 2⁻⁶.
        return torch.maximum(weight.abs() / 16, stored["weight_scale"] * 2.0**-10)

    def as_served(self, inputs: Tensor, stored: Stored) -> Tensor:
        return round_through_fp8(inputs, stored["input_scale"])

    def config(self, kept: Sequence[str]) -> dict[str, Any]:
        return {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": list(kept)}


class Int8W8A8(WeightFormat):
    """int8 weights, one scale per output channel; inputs are int8 too, with one scale a token, taken while serving."""

    format = int8(PLAIN, IgnoredLayers())

    def encode(self, weights: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        return [self._encode(weight) for weight in weights]

    def _encode(self, weight: Tensor) -> dict[str, Tensor]:
        blocks = in_blocks(weight, lambda rows: quantize_per_channel(weight[rows]))
        values, scale = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        return self._pack(values) | {"weight_scale": scale}

    def decode(self, stored: Stored) -> Tensor:
        return self._unpack(stored).float() * stored["weight_scale"]

    def half_step(self, weight: Tensor, stored: Stored) -> Tensor:
        return stored["weight_scale"] / 2

    def as_served(self, inputs: Tensor, stored: Stored) -> Tensor:
        values, scale = quantize_per_channel(inputs)
        return values.float() * scale

    def config(self, kept: Sequence[str]) -> dict[str, Any]:
        return describe(str(self.format.kind), kept)

    def _pack(self, values: Tensor) -> dict[str, Tensor]:
        """What is stored for int8 `[out, in]`."""
        return {"weight": values}

    def _unpack(self, stored: Stored) -> Tensor:
        return stored["weight"]


class Int8(Int8W8A8):
    """int8 weights alone, four in an int32. Readers other than ours need the shape: rows may have been padded to whole
    int32."""

    format = int8(PACKED, IgnoredLayers())
    word = 4

    def as_served(self, inputs: Tensor, stored: Stored) -> Tensor:
        return inputs

    def _pack(self, values: Tensor) -> dict[str, Tensor]:
        return {"weight_packed": pack_int8(values), "weight_shape": torch.tensor(values.shape)}

    def _unpack(self, stored: Stored) -> Tensor:
        return unpack_int8(stored["weight_packed"], int(stored["weight_shape"][1]))


FORMATS: dict[str, WeightFormat] = {"int8": Int8(), "int8-w8a8": Int8W8A8(), "fp8": Fp8()}
"""By the schemes' names (`quant.schemes.WRITTEN`)."""


def specs_of(
    unit: Unit, weight_format: WeightFormat, shapes: dict[str, Shape], dtype: Callable[[str], torch.dtype]
) -> list[Spec]:
    """The tensors that will be written for a unit, known without reading it."""
    if not unit.quantised:
        return [Spec(name, dtype(name), shapes[name]) for name in unit.names]
    specs = [spec for name in unit.names for spec in weight_format.specs(name.removesuffix(".weight"), shapes[name])]
    if weight_format.static_inputs and (owner := unit.owned_cache):
        specs += [Spec(f"{owner}.{part}_scale", torch.float32, ()) for part in "kv"]
    return specs
