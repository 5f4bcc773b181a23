"""The tensors of quantised checkpoints: what each method stores for a linear layer, and which layers stay unquantised.

Shapes follow from the weight's `[out, in]`. Neither torch nor vLLM is imported.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from hunyuan_vllm.layout import FLOATS, FUSED, CheckpointError, Layout, Shape, expected_tensors
from hunyuan_vllm.network import Network

E4M3_NAME = "F8_E4M3"  # as safetensors' headers spell it
SCALAR: Shape = ()
NVFP4_GROUP = 16

_ITEM_BYTES = {"I32": 4, "F32": 4, "I8": 1, "U8": 1, E4M3_NAME: 1}
_CACHE_SCALE = re.compile(r"^(.*\.self_attn\.)(?:attn\.)?(kv|k|v)_scale$")
_OUTPUT_SCALE = re.compile(r"^(.*\.self_attn\.)(k|v)_(?:proj\.(?:output_scale|\2_scale)|cache\.scale)$")

Stored = tuple[Shape, tuple[str, ...]]  # a tensor's shape, and the types it may have, as safetensors spells them
Suffixes = dict[str, Stored]  # the last part of a tensor's name → the tensor


def is_quantised(name: str) -> bool:
    """Whether the schemes quantise the tensor of this canonical name: the weight of every attention, MLP and expert
    projection; not the router, norms, embeddings and head."""
    return name.endswith("_proj.weight")


def cache_scale(name: str) -> str | None:
    """The canonical name of a KV-cache scale, in any of its spellings; None for another tensor."""
    match = _CACHE_SCALE.match(name) or _OUTPUT_SCALE.match(name)
    return f"{match[1]}{match[2]}_scale" if match else None


class IgnoredLayers:
    """The linear layers that a checkpoint leaves unquantised, as its config lists them.

    An entry is one or more whole components of a layer's name ("model.layers.3", "mlp.shared_mlp", "o_proj"), in which
    a fused projection may stand for its parts; or it is "re:" and a pattern for the start of the name.
    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self.entries = entries = list(entries)
        self.names = [f".{entry}." for entry in entries if not entry.startswith("re:")]
        self.patterns = [re.compile(entry.removeprefix("re:")) for entry in entries if entry.startswith("re:")]

    def __contains__(self, linear: str) -> bool:
        module, _, projection = linear.rpartition(".")
        spellings = [linear, *(f"{module}.{fused}" for fused, parts in FUSED.items() if projection in parts)]
        return any(name in f".{spelling}." for name in self.names for spelling in spellings) or any(
            pattern.match(spelling) for pattern in self.patterns for spelling in spellings
        )

    def covers(self, module: str) -> bool:
        """Whether a linear layer of the engine, or its experts of a layer, are among them. One part stands for all that
        is fused, because `quantised_linears` refuses checkpoints that ignore a part."""
        parent, _, name = module.rpartition(".")
        first = "experts.0.gate_proj" if name == "experts" else FUSED.get(name, (name,))[0]
        return f"{parent}.{first}" in self


def quantised_linears(config: Network, ignored: IgnoredLayers) -> dict[str, Shape]:
    """Canonical name and weight's shape of the linear layers that are quantised."""
    shapes = {
        name.removesuffix(".weight"): shape for name, shape in expected_tensors(config).items() if is_quantised(name)
    }
    left = {linear for linear in shapes if linear in ignored} if ignored.entries else set()
    partly = {gemm_of(linear): linear for linear in left}
    for linear in shapes:
        if linear not in left and (other := partly.get(gemm_of(linear))):
            raise CheckpointError(
                f"quantization_config leaves {other!r} unquantised and not {linear!r}, which are computed in one GEMM: "
                "it must name both or neither"
            )
    return {linear: shape for linear, shape in shapes.items() if linear not in left}


def gemm_of(linear: str) -> str:
    """What the engine computes this linear layer with: its fused projection, all experts of its layer, or itself."""
    module, _, projection = linear.rpartition(".")
    if ".experts." in module:
        return module.rpartition(".")[0]
    return next((f"{module}.{fused}" for fused, parts in FUSED.items() if projection in parts), linear)


@dataclass(frozen=True)
class StoredTensors:
    """How a method stores the weight `[out, in]` of a linear layer.

    Attributes:
        tensors: `(out, in)` → suffix → what must be there.
        optional: the same of what may be there.
        group: inputs that share a scale; None where all of an output channel, or of the tensor, do.
        block: outputs that share a scale.
        pack: neighbouring values in an element.
    """

    tensors: Callable[[int, int], Suffixes]
    optional: Callable[[int, int], Suffixes] = lambda outputs, inputs: {}
    group: int | None = None
    block: int = 1
    pack: int = 1

    def bytes(self, outputs: int, inputs: int) -> int:
        """Of a weight and its scales, which are two bytes each where they may be of several types."""
        return sum(
            prod(shape) * _ITEM_BYTES.get(types[0], 2) for shape, types in self.tensors(outputs, inputs).values()
        )


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


def packed(bits: int, group: int | None = None, symmetric: bool = True) -> StoredTensors:
    """compressed-tensors' `pack-quantized`: packed along the inputs of each output."""

    def tensors(outputs: int, inputs: int) -> Suffixes:
        groups = _groups(inputs, group)
        zero_points: Suffixes = {"weight_zero_point": ((-(-outputs * bits // 32), groups), ("I32",))}
        found: Suffixes = {
            "weight_packed": ((outputs, -(-inputs * bits // 32)), ("I32",)),
            "weight_scale": ((outputs, groups), FLOATS),
        }
        return found if symmetric else found | zero_points

    return StoredTensors(
        tensors, lambda outputs, inputs: {"weight_shape": ((2,), ("I32", "I64"))}, group, pack=32 // bits
    )


INT8 = StoredTensors(
    lambda outputs, inputs: {"weight": ((outputs, inputs), ("I8",)), "weight_scale": ((outputs, 1), FLOATS)}
)
"""compressed-tensors' `int-quantized`."""


def fp8(
    per_channel: bool = False,
    block: tuple[int, int] | None = None,
    block_scale: str = "weight_scale_inv",
    input_scale: bool = False,
) -> StoredTensors:
    """E4M3 weights with a scale per tensor, an output channel, or a block of `[out, in]`; and one of the inputs."""

    def tensors(outputs: int, inputs: int) -> Suffixes:
        found: Suffixes = {"weight": ((outputs, inputs), (E4M3_NAME,))}
        if block:
            found[block_scale] = ((-(-outputs // block[0]), -(-inputs // block[1])), FLOATS)
        else:
            found["weight_scale"] = ((outputs, 1) if per_channel else SCALAR, FLOATS)
        return found | ({"input_scale": (SCALAR, FLOATS)} if input_scale else {})

    return StoredTensors(tensors, group=block[1] if block else None, block=block[0] if block else 1)


def nvfp4(weight: str, global_scale: str, input_scale: str | None) -> StoredTensors:
    """Two E2M1 values a byte, an E4M3 scale for 16 inputs and one for the tensor, under a tool's own names."""

    def tensors(outputs: int, inputs: int) -> Suffixes:
        found: Suffixes = {
            weight: ((outputs, inputs // 2), ("U8",)),
            "weight_scale": ((outputs, inputs // NVFP4_GROUP), (E4M3_NAME,)),
            global_scale: (SCALAR, ("F32",)),
        }
        return found | ({input_scale: (SCALAR, ("F32",))} if input_scale else {})

    return StoredTensors(tensors, group=NVFP4_GROUP)


class QuantisedLayout(Layout):
    """The tensors of a quantised checkpoint. A scale of a whole tensor may be stored as `[]` or as `[1]`.

    The canonical KV-cache scales are `model.layers.N.self_attn.{kv_scale,k_scale,v_scale}`.

    Args:
        ignored: the linear layers that are not quantised; None: those that have a `weight` instead of the method's
            tensors, which only methods with names of their own allow.

    Raises:
        CheckpointError: only a part of what the engine computes in one GEMM is ignored, or a weight cannot be packed.
    """

    def __init__(
        self,
        config: Network,
        stored: Callable[[str], StoredTensors],
        ignored: IgnoredLayers | None,
        cache_scales: bool = True,
    ) -> None:
        self.quantised = quantised_linears(config, ignored or IgnoredLayers())
        expected: dict[str, Shape] = {}
        optional: dict[str, Shape] = {}
        if cache_scales:
            attentions = [f"model.layers.{layer}.self_attn." for layer in range(config.num_hidden_layers)]
            optional |= {f"{name}{kind}_scale": SCALAR for name in attentions for kind in ("kv", "k", "v")}
        self._types: dict[str, tuple[str, ...]] = {}
        self._alternatives: dict[str, list[str]] = {}  # a linear layer → its tensors where it is quantised
        for name, shape in expected_tensors(config).items():
            linear = name.removesuffix(".weight")
            if linear not in self.quantised:
                expected[name] = shape
                continue
            how = stored(linear)
            _check_packing(linear, shape, how)
            for tensors, known in ((how.tensors, expected), (how.optional, optional)):
                for suffix, (kept, types) in tensors(*shape).items():
                    known[f"{linear}.{suffix}"] = kept
                    self._types[f"{linear}.{suffix}"] = types
            if ignored is None:
                self._alternatives[linear] = [f"{linear}.{suffix}" for suffix in how.tensors(*shape)]
                optional[name] = shape
        super().__init__(config, expected, optional)

    def parts(self, name: str) -> tuple[str, ...]:
        return super().parts(cache_scale(name) or name)

    def shape(self, parts: tuple[str, ...]) -> Shape:
        return SCALAR if self.known[parts[0]] == SCALAR else super().shape(parts)

    def names(self, name: str, shape: Iterable[int]) -> tuple[str, ...]:
        parts, shape = self.parts(name), tuple(shape)
        if not parts or self.shape(parts) != SCALAR:
            return super().names(name, shape)
        if shape not in (SCALAR, (1,)):
            raise CheckpointError(
                f"checkpoint tensor {name!r} has shape {list(shape)}; quantization_config promises one scale per "
                "tensor, [] or [1]: convert the BF16 checkpoint with hunyuan-vllm quantize"
            )
        return parts

    def split(self, name: str, tensor: Any) -> list[tuple[str, Any]]:
        parts = self.names(name, tensor.shape)
        if parts and self.shape(parts) == SCALAR:
            return [(part, tensor.reshape(())) for part in parts]
        return super().split(name, tensor)

    def types(self, part: str) -> tuple[str, ...]:
        return self._types.get(part, FLOATS)

    def missing(self, seen: Iterable[str]) -> list[str]:
        """What a linear layer that is stored unquantised does not need is not missing; but all that the engine computes
        in one GEMM must be stored alike."""
        present = set(seen)
        plain: dict[str, list[bool]] = defaultdict(list)
        for linear, tensors in self._alternatives.items():
            plain[gemm_of(linear)].append(f"{linear}.weight" in present and not present.intersection(tensors))
        left = {
            tensor
            for linear, tensors in self._alternatives.items()
            if all(plain[gemm_of(linear)])
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
