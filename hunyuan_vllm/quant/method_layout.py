"""Checkpoints that vLLM's own quantisations load: which tensors each keeps of a linear layer's weight.

GPTQ, AWQ, compressed-tensors, FP8 with dynamic scales and NVFP4. Shapes follow from the weight's `[out, in]`; vLLM's
own weight loaders place the tensors. No vLLM is imported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import FLOATS, CheckpointError, Layout, Shape, expected_tensors
from hunyuan_vllm.quant.layouts import (
    E4M3_NAME,
    SCALAR,
    IgnoredLayers,
    cache_scale,
    cache_scales,
    product_of,
    quantised_linears,
)

__all__ = ["MethodLayout", "StoredTensors", "awq", "fp8", "gptq", "nvfp4", "packed"]

NVFP4_GROUP = 16
ITEM_BYTES = {"I32": 4, "F32": 4, "U8": 1, E4M3_NAME: 1}
Stored = tuple[Shape, tuple[str, ...]]  # a tensor's shape, and the types it may have, as safetensors spells them


@dataclass(frozen=True)
class StoredTensors:
    """How a method keeps the weight `[out, in]` of a linear layer.

    Attributes:
        tensors: `(out, in)` → suffix → what must be there.
        optional: the same of what may be there.
        group: inputs that share a scale; None where all of an output channel, or of the tensor, do.
        block: outputs that share a scale.
        pack: neighbouring values in an element.
    """

    tensors: Callable[[int, int], dict[str, Stored]]
    optional: Callable[[int, int], dict[str, Stored]] = lambda outputs, inputs: {}
    group: int | None = None
    block: int = 1
    pack: int = 1

    def bytes(self, outputs: int, inputs: int) -> int:
        """Of a weight and its scales, which are two bytes each where they may be of several types."""
        return sum(prod(shape) * ITEM_BYTES.get(types[0], 2) for shape, types in self.tensors(outputs, inputs).values())


def _groups(inputs: int, group: int | None) -> int:
    return -(-inputs // group) if group else 1


def gptq(bits: int, group: int | None) -> StoredTensors:
    """AutoGPTQ's and GPTQModel's: packed along the inputs, zero points beside (all alike where it is symmetric)."""
    pack = 32 // bits
    return StoredTensors(
        lambda outputs, inputs: {
            "qweight": ((inputs // pack, outputs), ("I32",)),
            "scales": ((_groups(inputs, group), outputs), FLOATS),
            "qzeros": ((_groups(inputs, group), outputs // pack), ("I32",)),
        },
        lambda outputs, inputs: {"g_idx": ((inputs,), ("I32",))},
        group,
        pack=pack,
    )


def awq(group: int | None) -> StoredTensors:
    """AutoAWQ's: 4 bits, packed along the outputs."""
    return StoredTensors(
        lambda outputs, inputs: {
            "qweight": ((inputs, outputs // 8), ("I32",)),
            "scales": ((_groups(inputs, group), outputs), FLOATS),
            "qzeros": ((_groups(inputs, group), outputs // 8), ("I32",)),
        },
        group=group,
        pack=8,
    )


def packed(bits: int, group: int | None, symmetric: bool) -> StoredTensors:
    """compressed-tensors' `pack-quantized`: packed along the inputs of each output."""

    def tensors(outputs: int, inputs: int) -> dict[str, Stored]:
        groups = _groups(inputs, group)
        zero_points: dict[str, Stored] = {"weight_zero_point": ((-(-outputs * bits // 32), groups), ("I32",))}
        found: dict[str, Stored] = {
            "weight_packed": ((outputs, -(-inputs * bits // 32)), ("I32",)),
            "weight_scale": ((outputs, groups), FLOATS),
        }
        return found if symmetric else found | zero_points

    return StoredTensors(
        tensors, lambda outputs, inputs: {"weight_shape": ((2,), ("I32", "I64"))}, group, pack=32 // bits
    )


def fp8(
    per_channel: bool = False,
    block: tuple[int, int] | None = None,
    block_scale: str = "weight_scale_inv",
) -> StoredTensors:
    """E4M3 weights with a scale a tensor, an output channel, or a block of `[out, in]`."""

    def tensors(outputs: int, inputs: int) -> dict[str, Stored]:
        found: dict[str, Stored] = {"weight": ((outputs, inputs), (E4M3_NAME,))}
        if block:
            found[block_scale] = ((-(-outputs // block[0]), -(-inputs // block[1])), FLOATS)
        else:
            found["weight_scale"] = ((outputs, 1) if per_channel else SCALAR, FLOATS)
        return found

    return StoredTensors(tensors, group=block[1] if block else None, block=block[0] if block else 1)


def nvfp4(weight: str, global_scale: str, input_scale: str | None) -> StoredTensors:
    """Two E2M1 values a byte, an E4M3 scale for 16 inputs and one for the tensor, under a tool's own names."""

    def tensors(outputs: int, inputs: int) -> dict[str, Stored]:
        found: dict[str, Stored] = {
            weight: ((outputs, inputs // 2), ("U8",)),
            "weight_scale": ((outputs, inputs // NVFP4_GROUP), (E4M3_NAME,)),
            global_scale: (SCALAR, ("F32",)),
        }
        return found | ({input_scale: (SCALAR, ("F32",))} if input_scale else {})

    return StoredTensors(tensors, group=NVFP4_GROUP)


class MethodLayout(Layout):
    """The tensors of a checkpoint in a format of vLLM's own. Scales of a tensor may be stored as `[]` or as `[1]`.

    Args:
        method: how the linear layer of this name is kept.
        ignored: the linear layers that are not quantised; None: those that have a `weight` instead of the method's
            tensors, which only methods with names of their own allow.

    Raises:
        CheckpointError: only a part of what the engine computes in one product is ignored, or a weight cannot be
            packed.
    """

    def __init__(
        self, config: HunYuanConfig, method: Callable[[str], StoredTensors], ignored: IgnoredLayers | None
    ) -> None:
        linears = quantised_linears(config, ignored or IgnoredLayers())
        expected: dict[str, Shape] = {}
        optional: dict[str, Shape] = dict.fromkeys(cache_scales(config), SCALAR)
        self._types: dict[str, tuple[str, ...]] = {}
        self._alternatives: dict[str, list[str]] = {}  # a linear layer → its tensors where it is quantised
        for name, shape in expected_tensors(config).items():
            linear = name.removesuffix(".weight")
            if linear not in linears:
                expected[name] = shape
                continue
            stored = method(linear)
            _check_packing(linear, shape, stored)
            for tensors, known in ((stored.tensors, expected), (stored.optional, optional)):
                for suffix, (kept, types) in tensors(*shape).items():
                    known[f"{linear}.{suffix}"] = kept
                    self._types[f"{linear}.{suffix}"] = types
            if ignored is None:
                self._alternatives[linear] = [f"{linear}.{suffix}" for suffix in stored.tensors(*shape)]
                optional[name] = shape
        super().__init__(config, expected, optional)

    def parts(self, name: str) -> tuple[str, ...]:
        return super().parts(cache_scale(name) or name)

    def shape(self, parts: tuple[str, ...]) -> Shape:
        return SCALAR if self.known[parts[0]] == SCALAR else super().shape(parts)

    def names(self, name: str, shape: Iterable[int]) -> tuple[str, ...]:
        shape = tuple(shape)
        scalar = shape == (1,) and (parts := self.parts(name)) and self.shape(parts) == SCALAR
        return super().names(name, SCALAR if scalar else shape)

    def split(self, name: str, tensor: Any) -> list[tuple[str, Any]]:
        parts = self.names(name, tensor.shape)
        if parts and self.shape(parts) == SCALAR:
            return [(part, tensor.reshape(())) for part in parts]
        return super().split(name, tensor)

    def types(self, part: str) -> tuple[str, ...]:
        return self._types.get(part, FLOATS)

    def check_type(self, name: str, dtype: str) -> None:
        for part in self.parts(name):
            if dtype not in self.types(part):
                raise CheckpointError(
                    f"checkpoint tensor {name!r} is {dtype} where quantization_config promises "
                    f"{' or '.join(self.types(part))}: copy the config.json that belongs to the checkpoint"
                )

    def missing(self, seen: Iterable[str]) -> list[str]:
        """What a linear layer that is stored unquantised does not need is not missing; but all that the engine computes
        in one product must be stored alike."""
        present = set(seen)
        plain: dict[str, list[bool]] = defaultdict(list)
        for linear, tensors in self._alternatives.items():
            stored = f"{linear}.weight" in present and not present.intersection(tensors)
            plain[product_of(linear)].append(stored)
        left = {
            tensor
            for linear, tensors in self._alternatives.items()
            if all(plain[product_of(linear)])
            for tensor in tensors
        }
        return [name for name in super().missing(present) if name not in left]


def _check_packing(linear: str, shape: Shape, stored: StoredTensors) -> None:
    outputs, inputs = shape
    if inputs % stored.pack or outputs % stored.pack and "qweight" in stored.tensors(outputs, inputs):
        raise CheckpointError(
            f"quantization_config packs {stored.pack} values in an element, and {linear!r} is {outputs} × {inputs}: "
            "copy the config.json that belongs to the checkpoint"
        )
