"""What a checkpoint is stored as: read from its config, once for `check`, `plan`, the server and the loader.

A format is loaded by a quantisation of ours, by one of vLLM's own, or by none, and then says what to do. Neither torch,
transformers nor vLLM is imported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError, Layout, tensor_parallel_sizes
from hunyuan_vllm.quant import layouts, method_layout
from hunyuan_vllm.quant.layouts import IgnoredLayers
from hunyuan_vllm.quant.method_layout import MethodLayout, StoredTensors

__all__ = [
    "FP8", "OLDER_CPU", "Format", "UnservedFormat", "is_scale", "quantization_of", "read_format", "stored_format",
]  # fmt: skip

FP8 = "fp8"
CONVERT = "convert the unquantised checkpoint with hunyuan-vllm quantize"
GPUS_ONLY = f"vLLM loads it on GPUs only; for a CPU, {CONVERT} --scheme int8"
OLDER_CPU = f"vLLM has 4-bit kernels for CPUs with AVX-512, for experts with AMX; on this one, {CONVERT} --scheme int8"


class UnservedFormat(CheckpointError):
    """A format that cannot be served: what it is in `text`, and what to do in `remedy`."""

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(f"{text}: {remedy}")
        self.text, self.remedy = text, remedy


@dataclass(frozen=True)
class Format:
    """How a checkpoint stores its weights.

    Attributes:
        kind: None: unquantised; FP8, `PACKED` or `PLAIN`: a format of ours; else one of vLLM's own.
        name: for people.
        ignored: the linear layers that stay unquantised, as the config lists them; None: as the tensors show.
        method: how one of vLLM's own keeps the linear layer of a name.
        bits: of a weight.
        operands: what its products are computed in on GPUs that have the units.
        cpus: why a CPU cannot load it, "" if it can.
        is_int4: it has kernels for CPUs with AVX-512, and for experts with AMX.
    """

    kind: str | None = None
    name: str = "unquantised"
    ignored: IgnoredLayers | None = IgnoredLayers()
    method: Callable[[str], StoredTensors] | None = None
    bits: int = 16
    operands: str = "bf16"
    cpus: str = ""
    is_int4: bool = False

    @property
    def scheme(self) -> str | None:
        """The name of the scheme that it is stored in; None where it has none."""
        if self.is_int4:
            return "int4"
        if self.operands == "fp8":
            return "fp8"
        if self.method is not None:
            return None
        return {None: "bf16", layouts.PACKED: "int8", layouts.PLAIN: "int8-w8a8"}.get(self.kind)

    @property
    def hardware(self) -> str:
        """What it takes to load it, where that is not any GPU or CPU."""
        return "vLLM loads it on GPUs, and on CPUs with AVX-512; experts need AMX there" if self.is_int4 else self.cpus

    def layout(self, config: HunYuanConfig) -> Layout:
        """Names, shapes and types of the tensors that must be there, and of those that may.

        Raises:
            CheckpointError: the list of ignored layers cannot be followed.
        """
        if self.method is not None:
            return MethodLayout(config, self.method, self.ignored)
        ignored = self.ignored or IgnoredLayers()
        if self.kind is None:
            return Layout(config)
        if self.kind == FP8:
            return layouts.Fp8Layout(config, ignored)
        return layouts.Int8Layout(config, self.kind, ignored)

    def rank_problem(self, config: HunYuanConfig, ranks: int) -> str | None:
        """Why tensor-parallel ranks cannot share this network's weights in this format; None if they can."""
        if self.method is None:
            return None
        for name, side, size in _cuts(config, ranks):
            if self.ignored is not None and name in self.ignored:
                continue
            stored = self.method(name)
            group = stored.group if ranks > 1 and stored.group else 1  # the last of a whole layer may be short
            unit = math.lcm(group if side == "inputs" else stored.block, stored.pack)
            if size % unit:
                return (
                    f"with tensor_parallel_size {ranks} a rank has {size} {side} of {name.rpartition('.')[2]}, and the "
                    f"checkpoint ({self.name}) keeps them in units of {unit} that cannot be cut"
                )
        return None

    def check_ranks(self, config: HunYuanConfig, ranks: int) -> None:
        """Refuse a tensor-parallel size that cuts through what has one scale.

        Raises:
            UnservedFormat: names the sizes that would do.
        """
        if problem := self.rank_problem(config, ranks):
            sizes = self.rank_sizes(config)
            use = f"use tensor_parallel_size {' or '.join(map(str, sizes))} and pipeline stages" if sizes else CONVERT
            raise UnservedFormat(problem, use)

    def rank_sizes(self, config: HunYuanConfig) -> list[int]:
        """Tensor-parallel sizes that leave whole what has one scale, of those that the network divides over."""
        return [size for size in tensor_parallel_sizes(config) if self.rank_problem(config, size) is None]


def _cuts(config: HunYuanConfig, ranks: int) -> list[tuple[str, str, int]]:
    """(name, the side that is cut, how long it is on a rank) of one of each kind of linear layer."""
    heads, kv_heads = config.num_attention_heads // ranks, max(1, config.num_key_value_heads // ranks)
    attention = "model.layers.0.self_attn."
    found = [
        (f"{attention}q_proj", "outputs", heads * config.head_dim),
        (f"{attention}k_proj", "outputs", kv_heads * config.head_dim),
        (f"{attention}o_proj", "inputs", heads * config.head_dim),
    ]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp." + ("experts.0." if config.experts_at(layer) > 1 else "")
        width = config.intermediate_at(layer) // ranks
        found += [(f"{prefix}up_proj", "outputs", width), (f"{prefix}down_proj", "inputs", width)]
    return found


def is_scale(name: str) -> bool:
    """Whether a tensor holds scales of a quantised weight, of activations or of a KV cache."""
    return name.endswith(("_scale", "_scale_inv", "_scale_2", ".scales"))


def quantization_of(fields: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any] | None:
    """The description of a checkpoint's quantisation, from wherever vLLM reads it: config.json, or beside it
    hf_quant_config.json. None for an unquantised checkpoint.

    Raises:
        UnservedFormat: it is not a JSON object.
    """
    described = fields.get("quantization_config")
    source = folder / "hf_quant_config.json" if folder else None
    if described is None and source is not None and source.is_file():
        try:
            described = json.loads(source.read_text())
        except (OSError, ValueError) as error:
            raise UnservedFormat(f"{source} cannot be read ({error})", "download it again") from None
    if described is None:
        described = fields.get("compression_config")
    if described is None and isinstance(fields.get("quantization"), dict):  # MLX
        described = fields["quantization"]
    if described is None or described == {}:
        return None
    if not isinstance(described, dict):
        raise UnservedFormat(f"quantization_config has a form nobody reads: {described!r:.100}", "download it again")
    return {**described, "quant_method": _method(described)}


def _method(described: Mapping[str, Any]) -> str:
    """vLLM's name of the method."""
    producer = described.get("producer")
    if isinstance(producer, dict) and producer.get("name") == "modelopt":
        return "modelopt"
    method = str(described.get("quant_method") or "").lower().replace("compressed_tensors", "compressed-tensors")
    if not method and {"group_size", "bits"} <= set(described):
        return "mlx"
    return "modelopt" if method.startswith("modelopt") else method


def read_format(fields: Mapping[str, Any], folder: Path | None = None) -> Format:
    """The format of a checkpoint with this config.json.

    Args:
        folder: the checkpoint's, if there is more of it than its config.

    Raises:
        UnservedFormat: it cannot be served here.
    """
    described = quantization_of(fields, folder)
    if (
        described is not None
        and described["quant_method"] == "bitsandbytes"
        and folder
        and _holds_plain_weights(folder)
    ):
        raise UnservedFormat(
            "config.json has a quantization_config of bitsandbytes left over, and the weights are not quantised",
            "remove quantization_config from config.json",
        )
    return stored_format(described)


def _holds_plain_weights(folder: Path) -> bool:
    from hunyuan_vllm.checkpoint import tensor_names

    try:
        names = tensor_names(folder)
    except CheckpointError:
        return False
    return bool(names) and not any(".weight." in name or name.endswith(".SCB") for name in names)


def stored_format(described: Mapping[str, Any] | None) -> Format:
    """The format that a description, of `quantization_of`, stands for.

    Raises:
        UnservedFormat: it cannot be served here.
    """
    if not described:
        return Format()
    try:
        if layouts.is_static_per_tensor(described):
            name = "FP8 weights and activations, one scale a tensor"
            return Format(FP8, name, layouts.ignored_layers(described), bits=8, operands="fp8")
        if form := layouts.recognise(described):
            activations = " and activations" if form == layouts.PLAIN else ", packed"
            return Format(
                form,
                f"int8 weights{activations}, one scale an output channel",
                IgnoredLayers(described.get("ignore") or ()),
                bits=8,
                operands="int8" if form == layouts.PLAIN else "bf16",
            )
        method = described.get("quant_method")
        if read := _METHODS.get(str(method)):
            return read(described)
    except (AttributeError, TypeError, KeyError, ValueError, re.error) as error:
        if isinstance(error, UnservedFormat):
            raise
        raise UnservedFormat(
            f"quantization_config has a form nobody reads ({error!r:.100})", "download config.json again"
        ) from None
    raise UnservedFormat(f"quantization_config says {method!r}, which is not served here", CONVERT)


def _gptq(described: Mapping[str, Any]) -> Format:
    bits, group = int(described["bits"]), _group(described["group_size"])
    rules: Mapping[str, Any] = described.get("dynamic") or {}
    settings = [described, *(rule for pattern, rule in rules.items() if not pattern.startswith("-:"))]
    if any(rule.get("desc_act", described.get("desc_act")) for rule in settings) and group is not None:
        raise UnservedFormat("GPTQ with groups in the order of activations (desc_act) is not loaded by vLLM", CONVERT)
    if any(rule.get("bits", bits) not in (4, 8) or not rule.get("sym", True) for rule in settings):
        raise UnservedFormat(f"GPTQ is loaded with 4 or 8 bits, symmetric; this one is {_bits(described)}", CONVERT)
    if described.get("lm_head"):
        raise UnservedFormat("the head is quantised too (lm_head), which is not served here", CONVERT)

    def method(linear: str) -> StoredTensors:
        for pattern, rule in rules.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), linear):
                return method_layout.gptq(rule.get("bits", bits), _group(rule.get("group_size", group)))
        return method_layout.gptq(bits, group)

    cpus = "" if bits == 4 else GPUS_ONLY
    return Format("gptq", f"GPTQ, {_bits(described)}", None, method, bits, cpus=cpus, is_int4=bits == 4)


def _awq(described: Mapping[str, Any]) -> Format:
    bits = int(described.get("w_bit", described.get("bits", 0)))
    group = _group(described.get("q_group_size", described.get("group_size")))
    if bits != 4 or described.get("lm_head"):
        raise UnservedFormat(f"AWQ is loaded with 4 bits and an unquantised head; this one has {bits}", CONVERT)
    stored = method_layout.awq(group)
    name = f"AWQ, 4 bits, {_scales(group)}"
    return Format("awq", name, None, lambda linear: stored, bits, is_int4=True)


def _fp8(described: Mapping[str, Any]) -> Format:
    ignored = layouts.ignored_layers(described)
    if block := described.get("weight_block_size"):
        rows, columns = map(int, block)
        stored = method_layout.fp8(block=(rows, columns))
        name = f"FP8 weights, a scale for each block of {rows} × {columns}"
        return Format("fp8-block", name, ignored, lambda linear: stored, 8, "fp8", GPUS_ONLY)
    if described.get("activation_scheme") != "dynamic":
        raise UnservedFormat("FP8 weights whose activations have neither static nor dynamic scales", CONVERT)
    per_tensor = method_layout.fp8()
    name = "FP8 weights, one scale a tensor; activations scaled while computing"
    return Format("fp8-dynamic", name, ignored, lambda linear: per_tensor, 8, "fp8", GPUS_ONLY)


def _compressed_tensors(described: Mapping[str, Any]) -> Format:
    if described.get("transform_config") or described.get("sparsity_config"):
        raise UnservedFormat("compressed-tensors with transforms or sparsity is not served here", CONVERT)
    groups = list(described["config_groups"].values())
    kinds = [_compressed_group(group, group.get("format") or described.get("format")) for group in groups]
    targets = [(target, kind) for group, kind in zip(groups, kinds, strict=True) for target in group["targets"]]

    def method(linear: str) -> StoredTensors:
        named = (kind for target, kind in targets if target == linear or _matches(target, linear))
        others = (kind for target, kind in targets if target == "Linear")
        found = next(named, None) or next(others, None)
        if found is None:
            raise CheckpointError(f"quantization_config has no config group for {linear!r}: add it to ignore")
        return found.method(linear)  # type: ignore[misc]

    return replace(kinds[0], ignored=layouts.ignored_layers(described), method=method)


def _matches(target: str, linear: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), linear) is not None


def _compressed_group(group: Mapping[str, Any], form: str | None) -> Format:
    """A config group of compressed-tensors, whose layers are not looked at."""
    weights, inputs = group["weights"], group.get("input_activations") or None
    bits, kind, strategy = weights["num_bits"], weights.get("type", "int"), weights.get("strategy")
    symmetric, size = weights.get("symmetric", True), _group(weights.get("group_size"))
    activations = (inputs["strategy"], bool(inputs.get("dynamic"))) if inputs else None
    stored: StoredTensors | None = None
    found: tuple[Any, ...] = ()
    if form == "pack-quantized" and (kind, activations) == ("int", None) and bits in (4, 8):
        if weights.get("actorder") in ("group", "dynamic"):
            raise UnservedFormat("groups in the order of activations (actorder) are not loaded by vLLM", CONVERT)
        stored = method_layout.packed(bits, size, symmetric)
        found = ("bf16", "", True) if bits == 4 else ("bf16", GPUS_ONLY, False)
    elif form in ("float-quantized", "naive-quantized") and (kind, bits) == ("float", 8):
        # What vLLM's experts take.
        if (strategy, activations) == ("channel", ("token", True)):
            stored = method_layout.fp8(per_channel=True)
        elif strategy == "block" and activations == ("group", True):
            rows, columns = map(int, weights["block_structure"])
            stored = method_layout.fp8(block=(rows, columns), block_scale="weight_scale")
        found = ("fp8", GPUS_ONLY, False)
    elif form == "nvfp4-pack-quantized" and (kind, bits, strategy) == ("float", 4, "tensor_group"):
        scale = "input_global_scale" if inputs else None
        stored = method_layout.nvfp4("weight_packed", "weight_global_scale", scale)
        found = ("fp4", GPUS_ONLY, False)
    if stored is None:
        what = f"{form}, {bits} bits, {kind}, {strategy}"
        raise UnservedFormat(f"compressed-tensors in this form ({what}) is not served here", CONVERT)
    asymmetric = "" if symmetric else ", zero points"
    names = {"bf16": f"int{bits} weights", "fp8": "FP8 weights", "fp4": "NVFP4"}
    name = f"compressed-tensors, {names[found[0]]}, {_scales(size, strategy)}{asymmetric}"
    return Format(str(form), name, IgnoredLayers(), lambda linear: stored, bits, *found)


def _modelopt(described: Mapping[str, Any]) -> Format:
    settings = layouts.modelopt(described)
    algorithm = str(settings.get("quant_algo")).upper()
    if algorithm not in ("NVFP4", "W4A16_NVFP4"):
        raise UnservedFormat(f"ModelOpt's {algorithm} is not served here", f"use its FP8 or NVFP4, or {CONVERT}")
    stored = method_layout.nvfp4("weight", "weight_scale_2", "input_scale" if algorithm == "NVFP4" else None)
    name = f"ModelOpt, {algorithm}, {_scales(method_layout.NVFP4_GROUP)}"
    return Format("modelopt", name, layouts.ignored_layers(described), lambda linear: stored, 4, "fp4", GPUS_ONLY)


def _bitsandbytes(described: Mapping[str, Any]) -> Format:
    raise UnservedFormat(
        "the checkpoint is quantised by bitsandbytes, or a quantization_config of bitsandbytes is left over",
        "if the weights are BF16, remove quantization_config from config.json; else take the unquantised checkpoint",
    )


def _mlx(described: Mapping[str, Any]) -> Format:
    raise UnservedFormat(
        f"the checkpoint is quantised for MLX ({_bits(described)}), which vLLM does not load",
        "take the unquantised checkpoint, or write one with mlx_lm.convert --dequantize",
    )


_METHODS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "mlx": _mlx,
}


def _group(size: Any) -> int | None:
    return None if size is None or int(size) <= 0 else int(size)


def _scales(group: int | None, strategy: str | None = None) -> str:
    if group:
        return f"a scale for {group} inputs"
    return {"tensor": "a scale a tensor", "block": "a scale a block"}.get(strategy or "", "a scale an output channel")


def _bits(described: Mapping[str, Any]) -> str:
    asymmetric = "" if described.get("sym", True) else ", asymmetric"
    return f"{described.get('bits')} bits, {_scales(_group(described.get('group_size')))}{asymmetric}"
