"""Bytes of weights: equal to those of the real model class, built as one rank of many; Marlin's padding to vLLM's."""

from __future__ import annotations

from math import prod
from unittest.mock import patch

import pytest
from checkpoints import VARIANTS, tiny_config
from fake_cuda import fake_cuda
from meta_model import meta_model, parameter_bytes
from scenarios import QUANTISED, light, network, published
from vllm import _custom_ops
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_moe_padded_intermediate, marlin_padded_nk

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import expected_tensors
from hunyuan_vllm.plan.hardware import Gpu, find_gpu
from hunyuan_vllm.plan.memory import rank_weights
from hunyuan_vllm.plan.model import layer_matrices
from hunyuan_vllm.plan.scenario import stages
from hunyuan_vllm.plan.schemes import SCHEMES


def check(config: HunYuanConfig, scheme: str, tensor: int, partition: str = "", gpu: Gpu | None = None) -> None:
    """Every stage of a partition, which VLLM_PP_LAYER_PARTITION must name too."""
    pipeline = len(partition.split(",")) if partition else 1
    layers = [int(count) for count in partition.split(",")] if partition else [config.num_hidden_layers]
    for number, stage in enumerate(stages(config, layers)):
        weights = rank_weights(light(config), SCHEMES[scheme], tensor, stage, gpu)
        ranks = dict(tensor_parallel=tensor, pipeline_parallel=pipeline, stage=number)
        with meta_model(config, **ranks, **QUANTISED[scheme]) as model:
            assert weights.parameters == parameter_bytes(model)
            assert weights.buffers == sum(buffer.nbytes for buffer in model.buffers())


@pytest.mark.parametrize("scheme", QUANTISED)
@pytest.mark.parametrize("tensor", [8, 16])
def test_the_published_model_on_a_rank(scheme: str, tensor: int) -> None:
    """Eight of its 64 layers, which are alike: as vLLM makes them on CPUs, and as it makes them on an H100."""
    config = HunYuanConfig(**published().to_diff_dict() | {"num_hidden_layers": 8})
    check(config, scheme, tensor)
    with patch.object(_custom_ops, "cutlass_scaled_mm_supports_fp8", lambda capability: True), fake_cuda(9):
        check(config, scheme, tensor, gpu=find_gpu("H100"))


@pytest.mark.parametrize(("scheme", "tensor", "partition"), [("bf16", 8, "32,32"), ("int8", 2, "22,22,20")])
def test_the_published_model_in_stages(
    scheme: str, tensor: int, partition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", partition)
    check(published(), scheme, tensor, partition)


def test_stages_of_a_tied_and_of_an_untied_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied embedding is on the first stage and on the last."""
    for overrides in ({"tie_word_embeddings": True}, {"num_experts": [4, 1, 4, 4]}):
        monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,2")
        check(tiny_config(**overrides), "bf16", 2, "2,2")


@pytest.mark.parametrize("scheme", QUANTISED)
def test_every_branch_of_the_config(scheme: str) -> None:
    for overrides in VARIANTS.values():
        for tensor in (1, 2) if scheme == "bf16" else (2,):
            without = {"mlp_bias": False} if scheme.startswith("int8") else {}  # which int8 experts do not take
            check(tiny_config(**overrides | without), scheme, tensor)


def test_one_rank_holds_the_whole_checkpoint() -> None:
    """389B parameters, of which the routers are float32."""
    tensors = expected_tensors(published())
    routers = sum(prod(shape) for name, shape in tensors.items() if ".gate.wg." in name)
    elements = sum(prod(shape) for shape in tensors.values())
    assert round(elements / 1e9, 1) == 388.7
    assert rank_weights(network(), SCHEMES["bf16"], 1).parameters == 2 * elements + 2 * routers


@pytest.mark.parametrize("tensor", [1, 2, 4, 8, 16])
def test_marlin_pads_as_vllm_does(tensor: int) -> None:
    """Weights are int8, and scales BF16, a scale per output channel."""
    for config in (published(), tiny_config(), tiny_config(head_dim=80, num_attention_heads=16)):
        if config.num_attention_heads % tensor or config.intermediate_at(0) % tensor:
            continue
        for matrix in (*layer_matrices(config, 0, tensor), *layer_matrices(config, 1, tensor)):
            outputs, inputs = matrix.outputs, matrix.inputs
            if matrix.part == "router":
                padded = outputs, inputs
            elif matrix.part != "experts":
                padded = marlin_padded_nk(outputs, inputs)
            elif matrix.shards == 2:
                padded = 2 * marlin_moe_padded_intermediate(outputs // 2), inputs
            else:
                padded = outputs, marlin_moe_padded_intermediate(inputs)
            expected = prod(padded) - outputs * inputs + 2 * (padded[0] - outputs)
            assert SCHEMES["int8"].padding(matrix, find_gpu("H100")) == matrix.copies * expected
            assert SCHEMES["bf16"].padding(matrix, find_gpu("H100")) == 0


def test_fp8_products_take_multiples_of_16() -> None:
    """1144 columns of the shared MLP on each of 16 ranks become 1152; 8 ranks have nothing to pad, nor have experts."""
    padding = rank_weights(network(), SCHEMES["fp8"], 16, gpu=find_gpu("H20")).padding
    assert padding == 64 * 6400 * (1152 - 1144)
    assert rank_weights(network(), SCHEMES["fp8"], 8, gpu=find_gpu("H20")).padding == 0


def test_fp8_is_marlins_where_a_gpu_has_no_fp8() -> None:
    on_h100 = rank_weights(network(), SCHEMES["fp8"], 8, gpu=find_gpu("H100"))
    on_a100 = rank_weights(network(), SCHEMES["fp8"], 8, gpu=find_gpu("A100"))
    assert on_h100.padding == 0 < on_a100.padding
    assert SCHEMES["fp8"].rate(find_gpu("A100")) == SCHEMES["bf16"].rate(find_gpu("A100"))
