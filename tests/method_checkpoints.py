"""Checkpoints in the formats of other tools, packed here by hand, and the network that they stand for.

Values are packed one at a time as each format's description has it, so that a loader's reading of them is compared with
something else than itself.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import rewrite
from torch import Tensor

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output whose value is the n-th nibble of an int32
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])

Packed = tuple[dict[str, Tensor], Tensor]  # suffix → stored tensor, and the weight that they stand for


def rounded(weight: Tensor, zero: int, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit values 0…15 `[out, in]`, bfloat16 scales `[out, groups]`, and the weight they stand for, with one zero."""
    outputs, inputs = weight.shape
    grouped = weight.float().view(outputs, inputs // group, group)
    scale = (grouped.abs().amax(-1) / 7).clamp(min=1e-4).bfloat16()
    values = (grouped / scale.float()[..., None]).round().add(zero).clamp(0, 15)
    exact = (values - zero) * scale.float()[..., None]
    return values.int().view(outputs, inputs), scale, exact.view(outputs, inputs)


def in_words(rows: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """`[n, 8 m]` 4-bit values as `[n, m]` int32, the first in the lowest bits."""
    grouped = rows.long().view(rows.shape[0], -1, 8)
    words = sum(grouped[:, :, which] << (4 * place) for place, which in enumerate(order))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def gptq(weight: Tensor) -> Packed:
    values, scale, exact = rounded(weight, 8)
    groups = scale.shape[1]
    stored = {
        "qweight": in_words(values).t().contiguous(),
        "scales": scale.t().contiguous(),
        "qzeros": torch.full((groups, len(weight) // 8), 0x77777777, dtype=torch.int32),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }
    return stored, exact


def awq(weight: Tensor) -> Packed:
    zero = 5
    values, scale, exact = rounded(weight, zero)
    zeros = torch.full((scale.shape[1], len(weight)), zero)
    stored = {
        "qweight": in_words(values.t().contiguous(), AWQ_ORDER),
        "scales": scale.t().contiguous(),
        "qzeros": in_words(zeros, AWQ_ORDER),
    }
    return stored, exact


def pack_quantized(weight: Tensor, symmetric: bool = True) -> Packed:
    zero = 8 if symmetric else 5
    values, scale, exact = rounded(weight, zero)
    stored = {
        "weight_packed": in_words(values),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        zeros = torch.full((scale.shape[1], len(weight)), zero)
        stored["weight_zero_point"] = in_words(zeros).t().contiguous()
    return stored, exact


def fp8_block(weight: Tensor, block: int = GROUP, name: str = "weight_scale_inv") -> Packed:
    outputs, inputs = weight.shape
    blocks = weight.float().view(outputs // block, block, inputs // block, block)
    scale = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    exact = values.float() * scale[:, None, :, None]
    return {"weight": values.view(outputs, inputs), name: scale}, exact.view(outputs, inputs)


def fp8(weight: Tensor, per_channel: bool = False, input_scale: float | None = None) -> Packed:
    largest = weight.float().abs().amax(1, keepdim=True) if per_channel else weight.float().abs().amax()
    scale = largest / 448
    values = (weight.float() / scale).to(torch.float8_e4m3fn)
    stored = {"weight": values, "weight_scale": scale if per_channel else scale.reshape(1)}
    if input_scale is not None:
        stored["input_scale"] = torch.tensor([input_scale])
    return stored, values.float() * scale


def nvfp4(weight: Tensor, names: tuple[str, str, str], inverse: bool) -> Packed:
    """`names`: of the weight, its global scale and its input's; compressed-tensors keeps both scales inverted."""
    outputs, inputs = weight.shape
    grouped = weight.float().view(outputs, inputs // 16, 16)
    whole = torch.tensor(0.01)
    scale = (grouped.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    step = scale.float()[..., None] * whole
    nearest = (grouped.abs() / step.clamp(min=1e-9))[..., None].sub(E2M1).abs().argmin(-1)
    sign = (grouped < 0).long()
    code = (sign * 8 + nearest).view(outputs, inputs)
    exact = (E2M1[nearest] * (1 - 2 * sign) * step).view(outputs, inputs)
    pair = code.view(outputs, inputs // 2, 2)
    given = 1 / whole if inverse else whole
    stored = {
        names[0]: (pair[..., 0] | pair[..., 1] << 4).to(torch.uint8),
        "weight_scale": scale,
        names[1]: given.reshape(1) if inverse else given,
        names[2]: torch.tensor([50.0]) if inverse else torch.tensor(0.02),
    }
    return stored, exact


def compressed(weights: dict[str, Any], form: str, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
TOKEN8 = FLOAT8 | {"strategy": "token", "dynamic": True}
BLOCK = {"strategy": "block", "block_structure": [GROUP, GROUP]}
FLOAT4 = {
    "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16, "dynamic": False,
}  # fmt: skip
CT_FP4 = ("weight_packed", "weight_global_scale", "input_global_scale")
MODELOPT_FP4 = ("weight", "weight_scale_2", "input_scale")

# format → (quantization_config, packer)
FORMATS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Packed]]] = {
    "gptq": (
        {
            "quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False,
            "static_groups": True, "true_sequential": True, "checkpoint_format": "gptq",
        },
        gptq,
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        awq,
    ),
    "ct_int4": (compressed(INT4, "pack-quantized"), pack_quantized),
    "ct_int4_zero": (
        compressed(INT4 | {"symmetric": False}, "pack-quantized"),
        lambda weight: pack_quantized(weight, symmetric=False),
    ),
    "fp8_dynamic": (
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        lambda weight: fp8(weight),
    ),
    "ct_fp8_dynamic": (
        compressed(FLOAT8, "naive-quantized", FLOAT8 | {"dynamic": True}),
        lambda weight: fp8(weight),
    ),
    "fp8_block": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [GROUP, GROUP]},
        fp8_block,
    ),
    "ct_fp8_channel": (
        compressed(FLOAT8 | {"strategy": "channel"}, "float-quantized", TOKEN8),
        lambda weight: fp8(weight, per_channel=True),
    ),
    "ct_fp8_block": (
        compressed(FLOAT8 | BLOCK, "float-quantized", TOKEN8 | {"strategy": "group", "group_size": GROUP}),
        lambda weight: fp8_block(weight, name="weight_scale"),
    ),
    "ct_fp8_static": (
        compressed(FLOAT8, "naive-quantized", FLOAT8),
        lambda weight: fp8(weight, input_scale=0.02),
    ),
    "ct_nvfp4": (
        compressed(FLOAT4, "nvfp4-pack-quantized", FLOAT4 | {"dynamic": "local"}),
        lambda weight: nvfp4(weight, CT_FP4, inverse=True),
    ),
    "modelopt_fp8": (
        {
            "producer": {"name": "modelopt", "version": "0.29.0"},
            "quantization": {
                "quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head", "*.mlp.gate*"],
            },
        },
        lambda weight: fp8(weight, input_scale=0.02),
    ),
    "modelopt_nvfp4": (
        {
            "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*.mlp.gate.wg"], "group_size": 16,
        },
        lambda weight: nvfp4(weight, MODELOPT_FP4, inverse=False),
    ),
}  # fmt: skip


def quantise(
    source: Path, directory: Path, form: str, where: str = "quantization_config", skip: tuple[str, ...] = ()
) -> tuple[Path, Path]:
    """Copies of a small checkpoint: in this format, and in float32 with the weights that it stands for.

    Args:
        where: the field of config.json that describes it, or "hf_quant_config.json".
        skip: parts of the names of layers to leave as they are.
    """
    described, pack = FORMATS[form]
    stored_at, exact_at = directory / form, directory / f"{form}-exact"
    for target in (stored_at, exact_at):
        shutil.copytree(source, target)
    exact: dict[str, Tensor] = {}

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight") and not any(s in name for s in skip)]:
            stored, exact[name] = pack(tensors.pop(name))
            tensors |= {f"{name.removesuffix('weight')}{suffix}": tensor for suffix, tensor in stored.items()}

    rewrite(stored_at, change)
    rewrite(exact_at, lambda tensors: tensors.update(exact))
    fields = json.loads((stored_at / "config.json").read_text())
    if where == "hf_quant_config.json":
        (stored_at / where).write_text(json.dumps(described))
    else:
        (stored_at / "config.json").write_text(json.dumps(fields | {where: described}))
    (exact_at / "config.json").write_text(json.dumps(fields | {"torch_dtype": "float32"}))
    return stored_at, exact_at
