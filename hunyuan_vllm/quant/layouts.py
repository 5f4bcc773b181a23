"""Quantised checkpoints on disk: which tensors there are, and which layers are left unquantised"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import translate
from typing import Any

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import FLOATS, CheckpointError, Layout, Shape, expected_tensors
from hunyuan_vllm.quant.scheme import is_quantised

_FUSED_NAMES = {  # the last is vLLM's own spelling
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
    **dict.fromkeys(("gate_proj", "up_proj"), ("gate_and_up_proj", "gate_up_proj")),
}


class IgnoredLayers:
    """The linears that a checkpoint leaves unquantised, as its config lists them.

    An entry is one or more whole components of a linear's name ("model.layers.3", "mlp.shared_mlp", "o_proj"), in which
    a fused projection may stand for its parts; or it is "re:" and a pattern for the start of the name.
    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self.entries = entries = list(entries)
        self.names = [f".{entry}." for entry in entries if not entry.startswith("re:")]
        self.patterns = [re.compile(entry.removeprefix("re:")) for entry in entries if entry.startswith("re:")]

    def __contains__(self, linear: str) -> bool:
        spellings = [f".{spelling}." for spelling in _spellings(linear)]
        return any(name in spelling for name in self.names for spelling in spellings) or any(
            pattern.match(spelling[1:-1]) for pattern in self.patterns for spelling in spellings
        )

    def covers(self, module: str) -> bool:
        """Whether a linear of the engine, or its experts of a layer, are among them; one part stands for all that is
        fused, because `quantised_linears` refuses checkpoints that ignore a part."""
        parent, _, name = module.rpartition(".")
        first = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj", "experts": "experts.0.gate_proj"}.get(name, name)
        return f"{parent}.{first}" in self


def quantised_linears(config: HunYuanConfig, ignored: IgnoredLayers) -> dict[str, Shape]:
    """Canonical name and weight's shape of the linears that are quantised.

    Raises:
        CheckpointError: only a part of what the engine computes in one product is ignored.
    """
    shapes = {
        name.removesuffix(".weight"): shape for name, shape in expected_tensors(config).items() if is_quantised(name)
    }
    products: dict[str, list[str]] = defaultdict(list)
    for linear in shapes:
        products[product_of(linear)].append(linear)
    for linears in products.values():
        _refuse_partly_ignored(linears, ignored)
    return {linear: shape for linear, shape in shapes.items() if linear not in ignored}


def _spellings(linear: str) -> list[str]:
    """A linear's name, and those of the fused projections it may be part of."""
    module, _, projection = linear.rpartition(".")
    return [linear, *(f"{module}.{name}" for name in _FUSED_NAMES.get(projection, ()))]


def product_of(linear: str) -> str:
    """What the engine computes this linear with: its fused projection, all experts of its layer, or itself."""
    module, _, projection = linear.rpartition(".")
    if ".experts." in module:
        return module.rpartition(".")[0]
    return f"{module}.{_FUSED_NAMES.get(projection, (projection,))[0]}"


def _refuse_partly_ignored(linears: list[str], ignored: IgnoredLayers) -> None:
    left = [linear for linear in linears if linear in ignored]
    if left and len(left) < len(linears):
        other = next(linear for linear in linears if linear not in ignored)
        raise CheckpointError(
            f"quantization_config leaves {left[0]!r} unquantised and not {other!r}, which are computed in one product: "
            "it must name both or neither"
        )


PACKED = "pack-quantized"
PLAIN = "int-quantized"

_TYPES = {"weight": ("I8",), "weight_packed": ("I32",), "weight_scale": FLOATS, "weight_shape": ("I32", "I64")}


def describe(form: str, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint in `form`; `ignore` names the linears left as they were."""
    group = {
        "targets": ["Linear"],
        "weights": _arguments("channel", dynamic=False),
        "input_activations": _arguments("token", dynamic=True) if form == PLAIN else None,
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def recognise(config: Mapping[str, Any]) -> str | None:
    """The form a `quantization_config` describes, if it is one of ours; None for any other (4 bits, groups, …)."""
    groups = list((config.get("config_groups") or {}).values())
    others = ("kv_cache_scheme", "transform_config", "sparsity_config")
    if config.get("quant_method") != "compressed-tensors" or len(groups) != 1 or any(map(config.get, others)):
        return None
    (group,) = groups
    activations = group.get("input_activations")
    form = group.get("format") or config.get("format")
    if group.get("targets") != ["Linear"] or group.get("output_activations"):
        return None
    if not _matches(group.get("weights"), "channel", dynamic=False):
        return None
    if form == PACKED and activations is None:
        return PACKED
    if form == PLAIN and _matches(activations, "token", dynamic=True):
        return PLAIN
    return None


def stored_tensors(form: str, projection: str, shape: Shape) -> dict[str, Shape]:
    """Name → shape of what a checkpoint in `form` holds for the weight `[out, in]` of `projection`."""
    outputs, inputs = shape
    if form == PLAIN:
        return {f"{projection}.weight": shape, f"{projection}.weight_scale": (outputs, 1)}
    return {f"{projection}.weight_packed": (outputs, inputs // 4), f"{projection}.weight_scale": (outputs, 1)}


class Int8Layout(Layout):
    """The tensors of an int8 checkpoint in `form`; a packed one may also say its weights' shapes.

    Raises:
        CheckpointError: only a part of what the engine computes in one product is ignored.
    """

    def __init__(self, config: HunYuanConfig, form: str, ignored: IgnoredLayers) -> None:
        self.quantised = quantised_linears(config, ignored)
        expected: dict[str, Shape] = {}
        for name, shape in expected_tensors(config).items():
            linear = name.removesuffix(".weight")
            expected |= stored_tensors(form, linear, shape) if linear in self.quantised else {name: shape}
        packed = self.quantised if form == PACKED else ()
        super().__init__(config, expected, {f"{linear}.weight_shape": (2,) for linear in packed})

    def types(self, part: str) -> tuple[str, ...]:
        linear, _, kind = part.rpartition(".")
        return _TYPES[kind] if linear in self.quantised and kind != "bias" else FLOATS

    def check_type(self, name: str, dtype: str) -> None:
        for part in self.parts(name):
            if dtype not in (types := self.types(part)):
                raise CheckpointError(
                    f"checkpoint tensor {name!r} is {dtype} where config.json's quantization_config promises "
                    f"{' or '.join(types)}: copy the config.json that belongs to the checkpoint"
                )


def _arguments(strategy: str, dynamic: bool) -> dict[str, Any]:
    """compressed-tensors' `QuantizationArgs`."""
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": None,
        "dynamic": dynamic,
        "actorder": None,
        "observer": None if dynamic else "minmax",
    }


def _matches(arguments: Mapping[str, Any] | None, strategy: str, dynamic: bool) -> bool:
    wanted = _arguments(strategy, dynamic)
    del wanted["observer"]  # how scales were found is not ours to judge
    return arguments is not None and all(arguments.get(name) == value for name, value in wanted.items())


E4M3_NAME = "F8_E4M3"  # as safetensors' headers spell it
SCALAR: Shape = ()

_FUSED_SCALE = re.compile(r"^(.*\.)(qkv_proj|gate_and_up_proj)\.(weight_scale|input_scale)$")
_FUSED_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_and_up_proj": ("up_proj", "gate_proj")}
_CACHE_SCALE = re.compile(r"^(.*\.self_attn\.)(?:attn\.)?(kv|k|v)_scale$")
_OUTPUT_SCALE = re.compile(r"^(.*\.self_attn\.)(k|v)_proj\.(?:output_scale|\2_scale)$")


def is_static_per_tensor(quantization: Mapping[str, Any]) -> bool:
    """Whether config.json's quantization_config describes this layout: one scale a tensor, activations' included."""
    method = quantization.get("quant_method")
    if method == "fp8":
        return quantization.get("activation_scheme") == "static" and not quantization.get("weight_block_size")
    if method == "compressed-tensors":
        groups = list((quantization.get("config_groups") or {}).values())
        static = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
        return (
            len(groups) == 1
            and groups[0].get("targets") == ["Linear"]
            and all(
                {"symmetric": True, "dynamic": False, **(groups[0].get(part) or {})}.items() >= static.items()
                for part in ("weights", "input_activations")
            )
        )
    return method == "modelopt" and str(modelopt(quantization).get("quant_algo")).upper() == "FP8"


def modelopt(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """ModelOpt's settings, which older releases keep a level deeper, in a file of their own."""
    return quantization.get("quantization") or quantization


def ignored_layers(quantization: Mapping[str, Any]) -> IgnoredLayers:
    """What a quantization_config leaves unquantised, in any of the fields that say so; ModelOpt's are wildcards."""
    entries: list[str] = []
    for field in ("ignored_layers", "modules_to_not_convert", "ignore", "exclude_modules"):
        entries += modelopt(quantization).get(field) or []
    return IgnoredLayers([f"re:{translate(entry)}" if entry.endswith("*") else entry for entry in entries])


def cache_scales(config: HunYuanConfig) -> list[str]:
    """Canonical names of the KV-cache scales that a checkpoint may have."""
    attentions = [f"model.layers.{layer}.self_attn." for layer in range(config.num_hidden_layers)]
    return [f"{attention}{kind}" for attention in attentions for kind in ("kv_scale", "k_scale", "v_scale")]


def cache_scale(name: str) -> str | None:
    """The canonical name of a KV-cache scale, in any of its spellings; None for another tensor."""
    match = _CACHE_SCALE.match(name) or _OUTPUT_SCALE.match(name)
    return f"{match[1]}{match[2]}_scale" if match else None


class Fp8Layout(Layout):
    """The tensors of an FP8 checkpoint. Scales have the shape `[]`, and may be stored as `[1]`.

    The canonical KV scales are `model.layers.N.self_attn.{kv_scale,k_scale,v_scale}`.

    Raises:
        CheckpointError: only a part of what the engine computes in one product is ignored.
    """

    def __init__(self, config: HunYuanConfig, ignored: IgnoredLayers) -> None:
        linears = quantised_linears(config, ignored)
        self.quantised = {f"{linear}.weight" for linear in linears}
        expected: dict[str, Shape] = {}
        for name, shape in expected_tensors(config).items():
            expected[name] = shape
            if name in self.quantised:
                linear = name.removesuffix(".weight")
                expected |= {f"{linear}.weight_scale": SCALAR, f"{linear}.input_scale": SCALAR}
        super().__init__(config, expected, dict.fromkeys(cache_scales(config), SCALAR))

    def parts(self, name: str) -> tuple[str, ...]:
        if match := _FUSED_SCALE.match(name):
            parts = tuple(f"{match[1]}{part}.{match[3]}" for part in _FUSED_PARTS[match[2]])
            if all(part in self.known for part in parts):
                return parts
        return super().parts(cache_scale(name) or name)

    def shape(self, parts: tuple[str, ...]) -> Shape:
        return SCALAR if self.known[parts[0]] == SCALAR else super().shape(parts)

    def names(self, name: str, shape: Iterable[int]) -> tuple[str, ...]:
        parts, shape = self.parts(name), tuple(shape)
        if not parts or self.shape(parts) != SCALAR:
            return super().names(name, shape)
        if shape not in (SCALAR, (1,)):
            raise CheckpointError(
                f"checkpoint tensor {name!r} has shape {list(shape)}; FP8 checkpoints have one scale a tensor, [] or "
                "[1]: convert the BF16 checkpoint with hunyuan-vllm quantize --scheme fp8"
            )
        return parts

    def split(self, name: str, tensor: Any) -> list[tuple[str, Any]]:
        parts = self.names(name, tensor.shape)
        if parts and self.shape(parts) == SCALAR:
            return [(part, tensor.reshape(())) for part in parts]
        return super().split(name, tensor)

    def types(self, part: str) -> tuple[str, ...]:
        return (E4M3_NAME,) if part in self.quantised else FLOATS

    def check_type(self, name: str, dtype: str) -> None:
        for part in self.parts(name):
            if part in self.quantised and dtype != E4M3_NAME:
                raise CheckpointError(
                    f"checkpoint tensor {name!r} is {dtype} where quantization_config promises {E4M3_NAME}: add it to "
                    "ignored_layers if it was left unquantised"
                )
            if part not in self.quantised and dtype == E4M3_NAME:
                raise CheckpointError(
                    f"checkpoint tensor {name!r} is {dtype}, which the network needs unquantised, or which "
                    "ignored_layers in config.json says is unquantised"
                )
