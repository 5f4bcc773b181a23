"""Checkpoints in the formats that vLLM's own quantisations load.

On GPUs, as far as a machine without one shows it, every tensor of the file reaches its place. Where the CPU has the
kernels, the network computes what the file stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from checkpoints import tiny_config, write_checkpoint
from fake_cuda import fake_cuda
from golden_data import GOLDEN
from meta_model import meta_model
from method_checkpoints import FORMATS, quantise
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization.utils import nvfp4_utils

from hunyuan_vllm import preflight
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError
from hunyuan_vllm.plugin import register

RANKS, RANK = 2, 1  # the last
NETWORK = dict(num_hidden_layers=2, intermediate_size=128, hidden_size=256)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
V1_FORMATS = ("gptq", "awq", "ct_int4", "ct_fp8_static", "ct_fp8_dynamic", "fp8_dynamic")  # as published for V1
EXPERT = {"w13_": ("gate_proj", "up_proj"), "w2_": ("down_proj",)}


def v1_moe(**overrides: Any) -> HunYuanConfig:
    """A13B in small: top-4 of 8 experts and a shared one, in lists, heads wider than hidden_size says, a tied head."""
    fields = dict(
        model_type="hunyuan", architectures=["HunYuanMoEV1ForCausalLM"], use_cla=False, head_dim=128, num_experts=8,
        moe_topk=[4, 4], num_shared_expert=[1, 1], moe_intermediate_size=[128, 128], tie_word_embeddings=True,
    )  # fmt: skip
    return tiny_config(**fields | overrides)


def v1_dense(**overrides: Any) -> HunYuanConfig:
    fields = dict(
        model_type="hunyuan_v1_dense", architectures=["HunYuanDenseV1ForCausalLM"], use_cla=False, head_dim=128,
        num_experts=1, moe_topk=1, use_mixed_mlp_moe=False, tie_word_embeddings=True,
    )  # fmt: skip
    return tiny_config(**fields | overrides)


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


@contextmanager
def gpu() -> Iterator[None]:
    with ExitStack() as stack:
        # What the kernels of a build for GPUs answer at capability 9.0.
        stack.enter_context(patch.object(ops, "cutlass_scaled_mm_supports_fp8", lambda capability: True))
        stack.enter_context(patch.object(ops, "cutlass_scaled_mm_supports_block_fp8", lambda capability: True))
        stack.enter_context(patch.object(nvfp4_utils, "cutlass_scaled_mm_supports_fp4", lambda capability: False))
        stack.enter_context(fake_cuda(9, 0))
        yield


def holds(parameter: Tensor, parts: list[Tensor]) -> bool:
    """Whether a parameter is this rank's part of these tensors of the file, put together: cut along one side, or whole
    where ranks share it."""
    if parts[0].numel() == 1:
        return bool((parameter == torch.cat([part.reshape(1) for part in parts])).all())
    raw = [part.view(torch.uint8) if part.itemsize == 1 else part for part in parts]
    held = parameter.view(torch.uint8) if parameter.itemsize == 1 else parameter
    candidates = [raw, *([part.chunk(RANKS, side)[-1] for part in raw] for side in (0, 1))]
    return any(
        torch.equal(torch.cat(candidate, side).to(held.dtype), held)
        for candidate in candidates
        for side in (0, 1)
        if len({part.shape[1 - side] for part in candidate}) == 1
    )


def misplaced(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Parameters of quantised layers that do not hold what the file has for them."""
    wrong = []
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        parent, _, projection = module.rpartition(".")
        if kind.endswith(("_bias", "weight_shape")):  # biases that GPTQ files may have; a shape that nobody reads
            continue
        if module.endswith(".experts.routed_experts"):
            prefix = next(prefix for prefix in EXPERT if kind.startswith(prefix))
            for expert, held in enumerate(parameter):
                stems = [f"{parent}.{expert}.{part}" for part in EXPERT[prefix]]
                parts = [tensors[f"{stem}.{kind.removeprefix(prefix)}"] for stem in stems]
                if not holds(held, parts):
                    wrong.append(f"{name}[{expert}]")
        elif projection.endswith("_proj"):
            stems = [f"{parent}.{part}" for part in FUSED.get(projection, (projection,))]
            if not holds(parameter, [tensors[f"{stem}.{kind}"] for stem in stems]):
                wrong.append(name)
    return wrong


@pytest.mark.parametrize(
    ("form", "network"),
    [*((form, "large") for form in FORMATS), *((form, network) for form in V1_FORMATS for network in ("moe", "dense"))],
)
def test_every_tensor_reaches_its_place_on_gpus(form: str, network: str, tmp_path: Path) -> None:
    config = {"large": tiny_config, "moe": v1_moe, "dense": v1_dense}[network](**NETWORK)
    stored, _ = quantise(write_checkpoint(tmp_path / "source", config), tmp_path, form)
    tensors = load_file(stored / "model.safetensors")
    with (
        gpu(),
        meta_model(
            config, quantization_config=FORMATS[form][0], tensor_parallel=RANKS, rank=RANK, device="cpu"
        ) as model,
    ):
        loaded = model.load_weights(tensors.items())
        quantised = {name for name, _ in model.named_parameters() if "_proj." in name or ".routed_experts." in name}
        assert quantised - loaded == {name for name in quantised if name.endswith("_bias")}
        assert misplaced(model, tensors) == []


def test_layers_that_the_config_and_the_file_see_differently(tmp_path: Path) -> None:
    """GPTQ takes experts for quantised unless `dynamic` says otherwise."""
    config = tiny_config(**NETWORK)
    stored, _ = quantise(write_checkpoint(tmp_path / "source", config), tmp_path, "gptq", skip=(".experts.",))
    tensors = load_file(stored / "model.safetensors")
    with (
        gpu(),
        meta_model(config, quantization_config=FORMATS["gptq"][0], device="cpu") as model,
        pytest.raises(CheckpointError, match=r"auto_gptq does not load .*experts has no parameter 'w\d+_weight'"),
    ):
        model.load_weights(tensors.items())


def plain_gemm(
    input: Tensor, q_weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, **_: Any
) -> Tensor:
    """What vLLM's 4-bit kernel for CPUs computes of the layout that it is handed: blocks of 16 outputs."""
    inputs, outputs = input.shape[-1], scales.shape[1]
    nibbles = 4 * torch.arange(8)
    values = (q_weight.view(outputs // 16, inputs, 2, 1) >> nibbles & 15).view(outputs // 16, inputs, 16)
    zero: Any = 8 if zeros is None else (zeros[..., None] >> nibbles & 15).view(scales.shape)
    group = inputs // scales.shape[0]
    if zeros is not None:
        zero = zero.repeat_interleave(group, 0)
    weight = (values.transpose(0, 1).reshape(inputs, outputs) - zero) * scales.float().repeat_interleave(group, 0)
    output = input.float() @ weight
    return (output if bias is None else output + bias.float()).to(input.dtype)


@pytest.mark.parametrize("source", ["cla2_dense", "v1_7b"])
@pytest.mark.parametrize("form", ["gptq", "awq", "ct_int4", "ct_int4_zero"])
def test_cpus_compute_what_the_file_stands_for(
    form: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every linear layer of a dense golden checkpoint; where the CPU lacks the kernel, plain arithmetic on its operands
    takes its place. Tolerance: bfloat16's rounding of the result, which is 2⁻⁹."""
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        monkeypatch.setattr(ops, "cpu_gemm_wna16", plain_gemm)
        monkeypatch.setattr(preflight, "lacks_int4_kernels", lambda config: "")
    stored, exact = quantise(GOLDEN / source, tmp_path, form)
    weights = load_file(exact / "model.safetensors")
    config = HunYuanConfig.from_pretrained(GOLDEN / source)
    with meta_model(config, quantization_config=FORMATS[form][0], device="cpu") as model:
        model.load_weights(load_file(stored / "model.safetensors").items())
        linears = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
        assert len(linears) == 4 * config.num_hidden_layers, linears.keys()
        for name, linear in linears.items():
            parent, _, projection = name.rpartition(".")
            parts = [weights[f"{parent}.{part}.weight"] for part in FUSED.get(projection, (projection,))]
            linear.quant_method.process_weights_after_loading(linear)
            x = torch.randn(5, linear.input_size_per_partition).bfloat16()
            wanted = x.float() @ torch.cat(parts).T
            given = linear.quant_method.apply(linear, x).float()
            assert (given - wanted).abs().max() < 0.005 * wanted.abs().max(), name


@pytest.mark.parametrize(("network", "feature"), [("cla2_dense", "avx512"), ("cla2_top1", "amx_tile")])
def test_cpus_without_the_kernels_are_refused(
    network: str, feature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, f"_is_{feature}_supported", lambda: False)
    stored, _ = quantise(GOLDEN / network, tmp_path, "ct_int4")
    with pytest.raises(ValueError, match="4-bit kernels for CPUs with AVX-512, for experts with AMX"):
        EngineArgs(model=str(stored), skip_tokenizer_init=True).create_engine_config()
