"""config.json's quantization_config: read into a `Format`, and written for int8 checkpoints.

Neither torch nor vLLM is imported.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import translate
from pathlib import Path
from typing import Any

from hunyuan_vllm.layout import CheckpointError
from hunyuan_vllm.quant import layouts
from hunyuan_vllm.quant.formats import CONVERT, GPUS_ONLY, PACKED, PLAIN, Format, UnservedFormat
from hunyuan_vllm.quant.layouts import IgnoredLayers, StoredTensors


def quantization_of(fields: Mapping[str, Any], directory: Path | None = None) -> dict[str, Any] | None:
    """The description of a checkpoint's quantisation, from wherever vLLM reads it: config.json, or beside it
    hf_quant_config.json. None for an unquantised checkpoint.
    """
    described = fields.get("quantization_config")
    source = directory / "hf_quant_config.json" if directory else None
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
        raise UnservedFormat(f"quantization_config has an unknown form: {described!r:.100}", "download it again")
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


def read_format(fields: Mapping[str, Any], directory: Path | None = None) -> Format:
    """The format of a checkpoint with this config.json.

    Args:
        directory: the checkpoint's, if there is more of it than its config.
    """
    described = quantization_of(fields, directory)
    if (
        described is not None
        and described["quant_method"] == "bitsandbytes"
        and directory
        and _holds_plain_weights(directory)
    ):
        raise UnservedFormat(
            "config.json has a quantization_config of bitsandbytes left over, but the weights are not quantised",
            "remove quantization_config from config.json",
        )
    return stored_format(described)


def _holds_plain_weights(directory: Path) -> bool:
    from hunyuan_vllm.checkpoint import stored_tensors

    try:
        names = [tensor.name for tensor in stored_tensors(directory)]
    except CheckpointError:
        return False
    return bool(names) and not any(".weight." in name or name.endswith(".SCB") for name in names)


def stored_format(described: Mapping[str, Any] | None) -> Format:
    """The format that a description, of `quantization_of`, stands for."""
    if not described:
        return Format()
    try:
        if is_static_fp8(described):
            return static_fp8(ignored_layers(described))
        if form := int8_form(described):
            return int8(form, ignored_layers(described))
        method = described.get("quant_method")
        if read := _METHODS.get(str(method)):
            return read(described)
    except (AttributeError, TypeError, KeyError, ValueError, re.error) as error:
        if isinstance(error, UnservedFormat):
            raise
        raise UnservedFormat(
            f"quantization_config has an unknown form ({error!r:.100})", "download config.json again"
        ) from None
    raise UnservedFormat(f"quantization_config says {method!r}, which is not served here", CONVERT)


def static_fp8(ignored: IgnoredLayers) -> Format:
    """FP8 weights and activations, one scale per tensor."""
    stored = layouts.fp8(input_scale=True)
    name = "FP8 weights and activations, one scale per tensor"
    return Format("fp8", name, "fp8", True, lambda linear: stored, ignored, 8, "fp8")


def int8(form: str, ignored: IgnoredLayers) -> Format:
    """int8 weights as `PACKED` or `PLAIN` stores them."""
    if form == PLAIN:
        name = "int8 weights and activations, one scale per output channel"
        return Format(form, name, "int8-w8a8", True, lambda linear: layouts.INT8, ignored, 8, "int8")
    stored = layouts.packed(8)
    name = "int8 weights, packed, one scale per output channel"
    return Format(form, name, "int8", True, lambda linear: stored, ignored, 8)


def is_static_fp8(quantization: Mapping[str, Any]) -> bool:
    """Whether config.json's quantization_config describes FP8 with one scale per tensor, activations' included."""
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
    return method == "modelopt" and str(_modelopt_settings(quantization).get("quant_algo")).upper() == "FP8"


def _modelopt_settings(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """ModelOpt's settings, which older releases keep a level deeper, in a file of their own."""
    return quantization.get("quantization") or quantization


def ignored_layers(quantization: Mapping[str, Any]) -> IgnoredLayers:
    """What a quantization_config leaves unquantised, in any of the fields that say so; ModelOpt's are wildcards."""
    entries: list[str] = []
    for field in ("ignored_layers", "modules_to_not_convert", "ignore", "exclude_modules"):
        entries += _modelopt_settings(quantization).get(field) or []
    return IgnoredLayers([f"re:{translate(entry)}" if entry.endswith("*") else entry for entry in entries])


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


def int8_form(config: Mapping[str, Any]) -> str | None:
    """`PACKED` or `PLAIN`, if a quantization_config describes int8 with a scale a channel as ours; else None."""
    groups = list((config.get("config_groups") or {}).values())
    others = ("kv_cache_scheme", "transform_config", "sparsity_config")
    if config.get("quant_method") != "compressed-tensors" or len(groups) != 1 or any(map(config.get, others)):
        return None
    (group,) = groups
    activations = group.get("input_activations")
    form = group.get("format") or config.get("format")
    if group.get("targets") != ["Linear"] or group.get("output_activations"):
        return None
    if not _are(group.get("weights"), "channel", dynamic=False):
        return None
    if form == PACKED and activations is None:
        return PACKED
    if form == PLAIN and _are(activations, "token", dynamic=True):
        return PLAIN
    return None


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


def _are(arguments: Mapping[str, Any] | None, strategy: str, dynamic: bool) -> bool:
    wanted = _arguments(strategy, dynamic)
    del wanted["observer"]  # how scales were found is not ours to judge
    return arguments is not None and all(arguments.get(name) == value for name, value in wanted.items())


def _gptq(described: Mapping[str, Any]) -> Format:
    bits, group = int(described["bits"]), _group(described["group_size"])
    rules: Mapping[str, Any] = described.get("dynamic") or {}
    settings = [described, *(rule for pattern, rule in rules.items() if not pattern.startswith("-:"))]
    if any(rule.get("desc_act", described.get("desc_act")) for rule in settings) and group is not None:
        raise UnservedFormat(
            "GPTQ with desc_act (groups in the order of activations) is not supported by vLLM", CONVERT
        )
    if any(rule.get("bits", bits) not in (4, 8) or not rule.get("sym", True) for rule in settings):
        raise UnservedFormat(f"GPTQ is loaded with 4 or 8 bits, symmetric; this one is {_bits(described)}", CONVERT)
    if described.get("lm_head"):
        raise UnservedFormat("the head is quantised too (lm_head), which is not served here", CONVERT)

    def stored(linear: str) -> StoredTensors:
        for pattern, rule in rules.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), linear):
                return layouts.gptq(rule.get("bits", bits), _group(rule.get("group_size", group)))
        return layouts.gptq(bits, group)

    cpus = "" if bits == 4 else GPUS_ONLY
    scheme = "int4" if bits == 4 else None
    return Format("gptq", f"GPTQ, {_bits(described)}", scheme, False, stored, None, bits, cpus=cpus)


def _awq(described: Mapping[str, Any]) -> Format:
    bits = int(described.get("w_bit", described.get("bits", 0)))
    group = _group(described.get("q_group_size", described.get("group_size")))
    if bits != 4 or described.get("lm_head"):
        raise UnservedFormat(f"AWQ is loaded with 4 bits and an unquantised head; this one has {bits}", CONVERT)
    stored = layouts.awq(group)
    name = f"AWQ, 4 bits, {_scales(group)}"
    return Format("awq", name, "int4", False, lambda linear: stored, None, bits)


def _fp8(described: Mapping[str, Any]) -> Format:
    ignored = ignored_layers(described)
    if block := described.get("weight_block_size"):
        rows, columns = map(int, block)
        stored = layouts.fp8(block=(rows, columns))
        name = f"FP8 weights, a scale for each block of {rows} × {columns}"
        return Format("fp8-block", name, "fp8", False, lambda linear: stored, ignored, 8, "fp8", GPUS_ONLY)
    if described.get("activation_scheme") != "dynamic":
        raise UnservedFormat("FP8 weights with neither static nor dynamic activation scales", CONVERT)
    per_tensor = layouts.fp8()
    name = "FP8 weights, one scale per tensor; activations scaled while computing"
    return Format("fp8-dynamic", name, "fp8", False, lambda linear: per_tensor, ignored, 8, "fp8", GPUS_ONLY)


def _compressed_tensors(described: Mapping[str, Any]) -> Format:
    if described.get("transform_config") or described.get("sparsity_config"):
        raise UnservedFormat("compressed-tensors with transforms or sparsity is not served here", CONVERT)
    groups = list(described["config_groups"].values())
    kinds = [_compressed_group(group, group.get("format") or described.get("format")) for group in groups]
    targets = [(target, kind) for group, kind in zip(groups, kinds, strict=True) for target in group["targets"]]

    def stored(linear: str) -> StoredTensors:
        named = (kind for target, kind in targets if target == linear or _matches(target, linear))
        others = (kind for target, kind in targets if target == "Linear")
        found = next(named, None) or next(others, None)
        if found is None:
            raise CheckpointError(f"quantization_config has no config group for {linear!r}: add it to ignore")
        return found.stored(linear)  # type: ignore[misc]

    return replace(kinds[0], ignored=ignored_layers(described), stored=stored)


def _matches(target: str, linear: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), linear) is not None


def _compressed_group(group: Mapping[str, Any], form: str | None) -> Format:
    """A config group of compressed-tensors, whose layers are not looked at."""
    weights, inputs = group["weights"], group.get("input_activations") or None
    bits, kind, strategy = weights["num_bits"], weights.get("type", "int"), weights.get("strategy")
    symmetric, size = weights.get("symmetric", True), _group(weights.get("group_size"))
    activations = (inputs["strategy"], bool(inputs.get("dynamic"))) if inputs else None
    stored: StoredTensors | None = None
    scheme: str | None = None
    operands, cpus = "bf16", ""
    if form == "pack-quantized" and (kind, activations) == ("int", None) and bits in (4, 8):
        if weights.get("actorder") in ("group", "dynamic"):
            raise UnservedFormat("groups in the order of activations (actorder) are not supported by vLLM", CONVERT)
        stored = layouts.packed(bits, size, symmetric)
        scheme, operands, cpus = ("int4", "bf16", "") if bits == 4 else (None, "bf16", GPUS_ONLY)
    elif form in ("float-quantized", "naive-quantized") and (kind, bits) == ("float", 8):
        # What vLLM's experts take.
        if (strategy, activations) == ("channel", ("token", True)):
            stored = layouts.fp8(per_channel=True)
        elif (strategy, activations) == ("tensor", ("tensor", True)):
            stored = layouts.fp8()
        elif strategy == "block" and activations == ("group", True):
            rows, columns = map(int, weights["block_structure"])
            stored = layouts.fp8(block=(rows, columns), block_scale="weight_scale")
        scheme, operands, cpus = ("fp8", "fp8", GPUS_ONLY)
    elif form == "nvfp4-pack-quantized" and (kind, bits, strategy) == ("float", 4, "tensor_group"):
        scale = "input_global_scale" if inputs else None
        stored = layouts.nvfp4("weight_packed", "weight_global_scale", scale)
        scheme, operands, cpus = (None, "fp4", GPUS_ONLY)
    if stored is None:
        what = f"{form}, {bits} bits, {kind}, {strategy}"
        raise UnservedFormat(f"compressed-tensors in this form ({what}) is not served here", CONVERT)
    asymmetric = "" if symmetric else ", zero points"
    names = {"bf16": f"int{bits} weights", "fp8": "FP8 weights", "fp4": "NVFP4"}
    name = f"compressed-tensors, {names[operands]}, {_scales(size, strategy)}{asymmetric}"
    return Format(str(form), name, scheme, False, lambda linear: stored, IgnoredLayers(), bits, operands, cpus)


def _modelopt(described: Mapping[str, Any]) -> Format:
    settings = _modelopt_settings(described)
    algorithm = str(settings.get("quant_algo")).upper()
    if algorithm not in ("NVFP4", "W4A16_NVFP4"):
        raise UnservedFormat(f"ModelOpt's {algorithm} is not served here", f"use its FP8 or NVFP4, or {CONVERT}")
    stored = layouts.nvfp4("weight", "weight_scale_2", "input_scale" if algorithm == "NVFP4" else None)
    name = f"ModelOpt, {algorithm}, {_scales(layouts.NVFP4_GROUP)}"
    return Format("modelopt", name, None, False, lambda linear: stored, ignored_layers(described), 4, "fp4", GPUS_ONLY)


def _bitsandbytes(described: Mapping[str, Any]) -> Format:
    raise UnservedFormat(
        "the checkpoint is quantised by bitsandbytes, or a quantization_config of bitsandbytes is left over",
        "if the weights are BF16, remove quantization_config from config.json; otherwise use an unquantised checkpoint",
    )


def _mlx(described: Mapping[str, Any]) -> Format:
    raise UnservedFormat(
        f"the checkpoint is quantised for MLX ({_bits(described)}), which vLLM does not load",
        "use the unquantised checkpoint, or write one with mlx_lm.convert --dequantize",
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
    return {"tensor": "a scale per tensor", "block": "a scale per block"}.get(
        strategy or "", "a scale per output channel"
    )


def _bits(described: Mapping[str, Any]) -> str:
    asymmetric = "" if described.get("sym", True) else ", asymmetric"
    return f"{described.get('bits')} bits, {_scales(_group(described.get('group_size')))}{asymmetric}"
