"""SmoothQuant changes no result of the network, to the bit, and tames outliers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import VARIANTS, rewrite, tiny_config, write_checkpoint
from test_calibrate import calibrated
from torch import Tensor

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.quantize.smooth import SmoothQuant, factors
from hunyuan_vllm.quantize.source import Source
from hunyuan_vllm.quantize.texts import pack
from hunyuan_vllm.reference import HunYuanForCausalLM

Documents = list[list[int]]


def plant_outliers(directory: Path, times: float = 60.0) -> None:
    """Make two channels large wherever activations pass: after both norms, in every up_proj, and in V."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
                tensor[[3, 40]] *= times
            elif name.endswith(("up_proj.weight", "v_proj.weight")):
                tensor[[1, 20]] *= times

    rewrite(directory, change)


def smoothed(source: Source, smoothing: SmoothQuant) -> HunYuanForCausalLM:
    tensors = {name: smoothing.apply(name, source.read(name)) for name in source.shapes}
    return model_of(source.config, tensors)


def model_of(config: HunYuanConfig, tensors: dict[str, Tensor]) -> HunYuanForCausalLM:
    model = HunYuanForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.bfloat16)
    return model.eval()


@torch.inference_mode()
def logits(model: HunYuanForCausalLM, documents: Documents) -> Tensor:
    return torch.cat([model(torch.tensor([document])).logits[0] for document in documents])


VARIANTS_TRIED = [
    "tiny", "biases", "cla_factor_3", "per_layer_fields", "no_qk_norm", "no_shared_expert", "one_kv_head", "tied",
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS_TRIED)
def test_the_network_computes_the_same_to_the_bit(tmp_path: Path, variant: str, documents: Documents) -> None:
    config = tiny_config(**VARIANTS.get(variant, {}))
    directory = write_checkpoint(tmp_path / "src", config)
    plant_outliers(directory)
    source = Source(directory)
    calibration = calibrated(directory, tmp_path / "out", pack(documents, 1000, 320))
    smoothing = SmoothQuant(config, 0.5, calibration.layer)
    changed = [n for n in source.shapes if not torch.equal(source.read(n), smoothing.apply(n, source.read(n)))]
    # Everything that has a part in it is in it.
    kinds = {name.split(".")[-2] for name in changed}
    moe = config.experts_at(0) > 1
    assert kinds == {
        "input_layernorm", "post_attention_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
        "down_proj", *(["wg"] if moe else []),
    }  # fmt: skip
    plain = model_of(config, {name: source.read(name) for name in source.shapes})
    assert torch.equal(logits(plain, documents), logits(smoothed(source, smoothing), documents))


@pytest.mark.parametrize("left_out", ["wg", "input_layernorm", "v_proj", "up_proj", "down_proj", "k_proj"])
def test_each_part_is_needed(tiny: Path, tmp_path: Path, documents: Documents, left_out: str) -> None:
    source = Source(tiny)
    calibration = calibrated(tiny, tmp_path / "out", pack(documents, 200, 320))
    smoothing = SmoothQuant(source.config, 0.5, calibration.layer)
    tensors = {
        name: source.read(name) if name.split(".")[-2] == left_out else smoothing.apply(name, source.read(name))
        for name in source.shapes
    }
    plain = model_of(source.config, {name: source.read(name) for name in source.shapes})
    assert (logits(plain, documents[:1]) - logits(model_of(source.config, tensors), documents[:1])).abs().max() > 0.1


def test_factors_are_powers_of_two_around_one() -> None:
    inputs, columns = torch.tensor([1.0, 100.0, 0.0, 4.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    found = factors(inputs, columns, 0.5)
    # sqrt(100) = 10 apart, split around 1: 2^1.66 and 2^-1.66. Channels without inputs or weights stay.
    assert found.tolist() == [0.25, 4.0, 1.0, 1.0]
    assert factors(inputs, columns, 0.0).tolist() == [1.0, 1.0, 1.0, 1.0]
    assert factors(torch.tensor([1e-30, 1e30]), torch.ones(2), 1.0).tolist() == [2.0**-10, 2.0**10]
