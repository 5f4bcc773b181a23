"""Int8 on GPUs, as far as a machine without one shows it: which kernels vLLM chooses, and what they are given.

None of the kernels has run here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import random_tensors, tiny_config
from fake_cuda import fake_cuda
from int8_reference import rounded
from meta_model import meta_model, parameter_bytes
from torch import Tensor, nn
from vllm.config import ParallelConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.model_executor.parameter import permute_param_layout_
from vllm.scalar_type import scalar_types

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.plugin import register
from hunyuan_vllm.preflight import check_quantisation

PUBLISHED: dict[str, Any] = dict(
    architectures=["HunYuanForCausalLM"],
    torch_dtype="bfloat16",
    vocab_size=129024,
    hidden_size=6400,
    intermediate_size=18304,
    num_attention_heads=80,
    num_key_value_heads=8,
    num_experts=16,
    use_mixed_mlp_moe=True,
    use_cla=True,
    cla_share_factor=2,
    use_qk_norm=True,
    tie_word_embeddings=True,
)
LINEARS = {
    "self_attn.qkv_proj",
    "self_attn.q_proj",
    "self_attn.o_proj",
    "shared_mlp.gate_up_proj",
    "shared_mlp.down_proj",
}
GATE_UP = ("gate", "up")
GB = 1e9


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def kernels(model: nn.Module) -> dict[str, str]:
    """The class that computes each kind of quantised module."""
    chosen = {}
    for name, module in model.named_modules():
        if kernel := getattr(getattr(module, "scheme", None), "kernel", None):
            chosen[".".join(name.split(".")[-2:])] = type(kernel).__name__
        elif experts := getattr(getattr(module, "quant_method", None), "experts_cls", None):
            chosen["experts"] = experts.__name__
    return chosen


@pytest.mark.parametrize("ranks", [8, 16])
@pytest.mark.parametrize(
    ("quantization", "capability", "linears", "experts"),
    [
        ("hunyuan_int8", (8, 0), "MarlinLinearKernel", "MarlinExperts"),
        ("hunyuan_int8", (9, 0), "HummingLinearKernel", "MarlinExperts"),
        ("hunyuan_int8", (10, 0), "MarlinLinearKernel", "MarlinExperts"),
        ("hunyuan_int8_w8a8", (8, 0), "CutlassInt8ScaledMMLinearKernel", "TritonExperts"),
        ("hunyuan_int8_w8a8", (9, 0), "CutlassInt8ScaledMMLinearKernel", "TritonExperts"),
    ],
)
def test_kernels_of_the_published_network(
    quantization: str, capability: tuple[int, int], linears: str, experts: str, ranks: int
) -> None:
    config = HunYuanConfig(**PUBLISHED, num_hidden_layers=2)
    with (
        fake_cuda(*capability),
        meta_model(config, quantization=quantization, tensor_parallel=ranks) as model,
    ):
        assert kernels(model) == dict.fromkeys(LINEARS, linears) | {"experts": experts}
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    width, packed = 18304 // ranks, 4 if quantization == "hunyuan_int8" else 1
    weight = "weight_packed" if packed == 4 else "weight"
    attention, mlp = "model.layers.{}.self_attn.", "model.layers.1.mlp."
    heads = 80 // ranks + 2 * max(1, 8 // ranks)
    assert shapes[f"{attention.format(0)}qkv_proj.{weight}"] == (heads * 80, 6400 // packed)
    assert shapes[f"{attention.format(1)}q_proj.{weight}"] == (6400 // ranks, 6400 // packed)
    assert shapes[f"{attention.format(1)}o_proj.{weight}"] == (6400, 6400 // ranks // packed)
    assert shapes[f"{mlp}shared_mlp.down_proj.{weight}"] == (6400, width // packed)
    assert shapes[f"{mlp}shared_mlp.down_proj.weight_scale"] == (6400, 1)
    assert shapes[f"{mlp}experts.routed_experts.w13_{weight}"] == (16, 2 * width, 6400 // packed)
    assert shapes[f"{mlp}experts.routed_experts.w2_{weight}"] == (16, 6400, width // packed)
    assert shapes[f"{mlp}experts.routed_experts.w2_weight_scale"] == (16, 6400, 1)


@pytest.mark.parametrize(
    ("capability", "quantization", "changes", "ranks", "message"),
    [
        ((10, 0), "hunyuan_int8_w8a8", {}, 8, "int8 kernels support compute capability up to 9.0"),
        (
            (9, 0),
            "hunyuan_int8",
            {"mlp_bias": True},
            8,
            "int8 experts cannot have biases, but config.json sets mlp_bias",
        ),
        ((9, 0), "hunyuan_int8", dict(intermediate_size=264), 4, r"packs 4 inputs .* on a rank .*\[66, 1600, 6400\]"),
    ],
)
def test_what_no_kernel_can_do_is_refused_at_once(
    capability: tuple[int, int], quantization: str, changes: dict[str, int], ranks: int, message: str
) -> None:
    config = HunYuanConfig(**PUBLISHED | changes, num_hidden_layers=2)
    with fake_cuda(*capability), pytest.raises(ValueError, match=message):
        check_quantisation(engine_config(config, quantization, ranks))


@pytest.mark.parametrize("backend", ["humming", "triton"])
def test_experts_kernels_without_scales_by_channel_are_refused(backend: str) -> None:
    config = HunYuanConfig(**PUBLISHED, num_hidden_layers=2)
    with fake_cuda(9, 0), pytest.raises(ValueError, match=f"moe_backend='{backend}': .* use 'auto' or 'marlin'"):
        check_quantisation(engine_config(config, "hunyuan_int8", 8, backend))


def engine_config(config: HunYuanConfig, quantization: str, ranks: int, moe_backend: str = "auto") -> Any:
    """The parts of vLLM's config that are looked at."""
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, quantization=quantization),
        parallel_config=ParallelConfig(tensor_parallel_size=ranks, distributed_executor_backend="mp"),
        kernel_config=SimpleNamespace(moe_backend=moe_backend),
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )


def test_bytes_a_gpu() -> None:
    """docs/quantization.md: 389B parameters on 8 GPUs, all of it, and what upstream's experts_int8 would leave."""
    config = HunYuanConfig(**PUBLISHED, num_hidden_layers=64)

    def size(quantization: str | None, part: str = "") -> float:
        with fake_cuda(9, 0), meta_model(config, quantization=quantization, tensor_parallel=8) as model:
            return parameter_bytes(model, part) / GB

    assert size(None) == pytest.approx(97.2, abs=0.05)
    assert size("hunyuan_int8") == pytest.approx(48.7, abs=0.05)
    assert size("hunyuan_int8_w8a8") == pytest.approx(48.8, abs=0.05)
    # experts_int8 makes the experts in BF16, on the meta device, and halves them layer by layer.
    experts = size("experts_int8", ".experts.")
    assert experts == pytest.approx(90.0, abs=0.05)
    assert size("experts_int8") - experts / 2 == pytest.approx(52.2, abs=0.05)


def dequantised(module: nn.Module, name: str = "") -> Tensor:
    """The weight `[..., out, in]` that vLLM's kernels are handed, by vLLM's own reading of it."""
    scale = module.get_parameter(f"{name}weight_scale").float()
    parameters = dict(module.named_parameters(recurse=False))
    if f"{name}weight" in parameters:
        return parameters[f"{name}weight"] * scale
    packed = parameters[f"{name}weight_packed"]
    if packed.dim() == 3:
        levels = [unpack_quantized_values_into_int32(expert.t(), scalar_types.uint8b128, 0).t() for expert in packed]
        return (torch.stack(levels) - 128) * scale
    # As MarlinLinearKernel.process_weights_after_loading reads it, to repack it.
    permute_param_layout_(packed, input_dim=0, output_dim=1, packed_dim=0)
    return (unpack_quantized_values_into_int32(packed.data, scalar_types.uint8b128, 0).t() - 128) * scale


@pytest.mark.parametrize("quantization", ["hunyuan_int8", "hunyuan_int8_w8a8"])
def test_what_the_kernels_are_given(quantization: str) -> None:
    """A rank's part of the weights, quantised; scales of weight-only kernels are bfloat16."""
    config = tiny_config(num_hidden_layers=2, use_cla=True)
    tensors = dict(random_tensors(config, seed=0))
    exact = {name: rounded(tensor.float()) for name, tensor in tensors.items() if name.endswith("_proj.weight")}
    owner, cross, mlp = "model.layers.0.self_attn.", "model.layers.1.self_attn.", "model.layers.1.mlp."

    def rows(name: str) -> Tensor:
        return exact[f"{name}.weight"].chunk(2, dim=0)[1]

    def columns(name: str) -> Tensor:
        return exact[f"{name}.weight"].chunk(2, dim=1)[1]

    with (
        fake_cuda(9, 0),
        meta_model(config, quantization=quantization, tensor_parallel=2, rank=1, device="cpu") as model,
    ):
        loaded = model.load_weights(tensors.items())
        assert {name for name, _ in model.named_parameters()} == loaded  # nothing is left to reload later
        experts = model.get_submodule(f"{mlp}experts.routed_experts")
        given = {
            f"{owner}qkv_proj": torch.cat([rows(f"{owner}{part}_proj") for part in "qkv"]),
            f"{cross}q_proj": rows(f"{cross}q_proj"),
            f"{cross}o_proj": columns(f"{cross}o_proj"),
            f"{mlp}shared_mlp.gate_up_proj": torch.cat([rows(f"{mlp}shared_mlp.{part}_proj") for part in GATE_UP]),
            f"{mlp}shared_mlp.down_proj": columns(f"{mlp}shared_mlp.down_proj"),
        }
        for name, wanted in given.items():
            torch.testing.assert_close(dequantised(model.get_submodule(name)), wanted, rtol=2**-8, atol=0)
        w13, w2 = dequantised(experts, "w13_"), dequantised(experts, "w2_")
    for expert in range(4):
        gate_up = [rows(f"{mlp}experts.{expert}.{part}_proj") for part in GATE_UP]
        torch.testing.assert_close(w13[expert], torch.cat(gate_up), rtol=2**-8, atol=0)
        torch.testing.assert_close(w2[expert], columns(f"{mlp}experts.{expert}.down_proj"), rtol=2**-8, atol=0)
