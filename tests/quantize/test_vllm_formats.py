"""What is written is what vLLM's own `fp8` method and compressed-tensors read; without our loaders, as far as a machine
without a GPU can show it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from checkpoints import tiny_config
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from fake_cuda import fake_cuda
from meta_model import meta_model
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod, Fp8MoEMethod
from vllm.model_executor.layers.quantization.utils.fp8_utils import process_fp8_weight_tensor_strategy

from hunyuan_vllm.quant.fp8 import HunYuanFp8Config
from hunyuan_vllm.quantize.convert import quantize_checkpoint

Documents = list[list[int]]


def quantization(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module")
def fp8(tiny: Path, documents: Documents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("upstream") / "fp8"
    quantize_checkpoint(tiny, directory, "fp8", calibration=documents)
    return directory


@pytest.fixture(scope="module")
def upstream_fp8(fp8: Path) -> Iterator[nn.Module]:
    """Our network with vLLM's own `fp8` method, as on an H100, loaded."""
    with (
        patch.object(HunYuanFp8Config, "override_quantization_method", classmethod(lambda *_, **__: None)),
        patch.object(ops, "cutlass_scaled_mm_supports_fp8", lambda capability: True),
        fake_cuda(9, 0),
        meta_model(tiny_config(), quantization_config=quantization(fp8), device="cpu") as model,
    ):
        tensors = load_file(fp8 / "model.safetensors")
        model.load_weights((n, t) for n, t in tensors.items() if not n.endswith(("k_scale", "v_scale")))
        yield model


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_upstream_fp8_takes_every_linear_layer_and_all_experts(upstream_fp8: nn.Module) -> None:
    assert type(upstream_fp8.quant_config) is Fp8Config and upstream_fp8.quant_config.activation_scheme == "static"
    methods = {
        name: type(module.quant_method)
        for name, module in upstream_fp8.named_modules()
        if isinstance(module, LinearBase | RoutedExperts)
    }
    linears = [name for name in methods if name.endswith("_proj")]
    assert len(linears) == 4 * 4 and all(methods[name] is Fp8LinearMethod for name in linears)
    experts = [name for name in methods if name.endswith("experts")]
    assert len(experts) == 4 and all(methods[name] is Fp8MoEMethod for name in experts)


def test_upstream_fp8_loads_fused_linears_and_requantises_nothing(upstream_fp8: nn.Module, fp8: Path) -> None:
    tensors = load_file(fp8 / "model.safetensors")
    qkv = upstream_fp8.get_submodule("model.layers.2.self_attn.qkv_proj")
    names = [f"model.layers.2.self_attn.{part}_proj" for part in "qkv"]
    whole = torch.cat([tensors[f"{name}.weight"].view(torch.int8) for name in names]).view(torch.float8_e4m3fn)
    assert same(qkv.weight, whole)
    assert torch.equal(qkv.weight_scale, torch.stack([tensors[f"{name}.weight_scale"] for name in names]))
    assert torch.equal(qkv.input_scale, torch.stack([tensors[f"{name}.input_scale"] for name in names]))

    def scaled_fp8_quant(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    with patch.object(ops, "scaled_fp8_quant", scaled_fp8_quant):
        weight, scale, input_scale = process_fp8_weight_tensor_strategy(
            qkv.weight.clone(), qkv.weight_scale, qkv.logical_widths, qkv.input_scale
        )
    assert same(weight.t().contiguous() if weight.shape != whole.shape else weight.contiguous(), whole)
    assert scale.max() == tensors[f"{names[0]}.weight_scale"]
    assert input_scale.max() == tensors[f"{names[0]}.input_scale"]


def test_upstream_fp8_loads_experts(upstream_fp8: nn.Module, fp8: Path) -> None:
    tensors = load_file(fp8 / "model.safetensors")
    (experts,) = [
        module
        for name, module in upstream_fp8.named_modules()
        if isinstance(module, RoutedExperts) and name.startswith("model.layers.3.")
    ]
    for expert in range(4):
        stem = f"model.layers.3.mlp.experts.{expert}"
        gate_up = [tensors[f"{stem}.{part}_proj.weight"].view(torch.int8) for part in ("gate", "up")]
        assert torch.equal(experts.w13_weight[expert].view(torch.int8), torch.cat(gate_up))
        assert same(experts.w2_weight[expert], tensors[f"{stem}.down_proj.weight"])
        assert (experts.w13_weight_scale[expert] == tensors[f"{stem}.up_proj.weight_scale"]).all()
        assert experts.w2_weight_scale[expert] == tensors[f"{stem}.down_proj.weight_scale"]
        assert experts.w13_input_scale[expert] == tensors[f"{stem}.up_proj.input_scale"]
        assert experts.w2_input_scale[expert] == tensors[f"{stem}.down_proj.input_scale"]
    # One scale a layer is what the kernels take: the greatest of these is each of these.
    assert len(experts.w13_input_scale.unique()) == len(experts.w2_input_scale.unique()) == 1


@pytest.mark.parametrize(
    ("scheme", "scheme_class"), [("int8", "CompressedTensorsWNA16"), ("int8-w8a8", "CompressedTensorsW8A8Int8")]
)
def test_compressed_tensors_knows_the_scheme(tiny: Path, tmp_path: Path, scheme: str, scheme_class: str) -> None:
    quantize_checkpoint(tiny, tmp_path / "dst", scheme)
    config = CompressedTensorsConfig.from_config(quantization(tmp_path / "dst"))
    linear = nn.Linear(4, 4)
    with fake_cuda(9, 0):
        for name in ("self_attn.q_proj", "mlp.shared_mlp.down_proj", "mlp.experts.3.up_proj"):
            found = config.get_scheme(linear, f"model.layers.1.{name}")
            assert type(found).__name__ == scheme_class
        for kept in ("lm_head", "model.layers.1.mlp.gate.wg"):
            assert config.get_scheme(linear, kept) is None


@pytest.mark.parametrize(("scheme", "form"), [("int8", "pack-quantized"), ("int8-w8a8", "int-quantized")])
def test_compressed_tensors_decompresses_to_the_rounded_weights(
    tiny: Path, tmp_path: Path, stored, scheme: str, form: str
) -> None:
    quantize_checkpoint(tiny, tmp_path / "dst", scheme)
    (group,) = quantization(tmp_path / "dst")["config_groups"].values()
    described = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry(form)
    written, source = stored(tmp_path / "dst"), stored(tiny)
    names = [name.removesuffix(".weight") for name in source if name.endswith("_proj.weight")]
    for name in names:
        own = {key.removeprefix(f"{name}."): t for key, t in written.items() if key.startswith(f"{name}.")}
        weight = compressor.decompress(own, described)["weight"]
        scale = source[f"{name}.weight"].float().abs().amax(1, keepdim=True) / 127
        wanted = (source[f"{name}.weight"].float() / scale).round() * scale
        torch.testing.assert_close(weight.float(), wanted, rtol=1e-6, atol=0)
