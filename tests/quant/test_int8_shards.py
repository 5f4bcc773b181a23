"""Int8 weights and scales are the same for any number of ranks, each of which has its part of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator

import pytest
import torch
from checkpoints import random_tensors, tiny_config
from meta_model import meta_model
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from hunyuan_vllm.quant import int8
from hunyuan_vllm.quant.rounding import quantize_per_channel

CONFIG = tiny_config(num_hidden_layers=2, num_experts=[4, 1])
ROW_PARALLEL = ("o_proj.", "down_proj.", ".w2_")

Parts = dict[str, list[Tensor]]
"""Parameter → its logical parts: those of q, k and v, of gate and up, or itself."""


def loaded(quantization: str, ranks: int, rank: int) -> Parts:
    """The quantised parameters of a rank, before they are packed for a kernel."""
    parts: Parts = {}
    with meta_model(CONFIG, quantization=quantization, tensor_parallel=ranks, rank=rank, device="cpu") as model:
        model.load_weights(random_tensors(CONFIG, seed=0))
        for name, parameter in model.named_parameters():
            module, _, kind = name.rpartition(".")
            if module.endswith("_proj"):
                parts[name] = list(parameter.split(model.get_submodule(module).output_partition_sizes))
            elif kind.startswith("w13"):
                parts[name] = list(parameter.chunk(2, dim=1))
            elif kind.startswith("w2"):
                parts[name] = [parameter]
    return parts


def joined(name: str, shares: list[Tensor]) -> Tensor:
    """One logical part, from those of all ranks."""
    if not any(part in name for part in ROW_PARALLEL):
        return torch.cat(shares, dim=-2)
    if name.endswith("scale") and all(torch.equal(share, shares[0]) for share in shares):
        return shares[0]  # every rank has all rows, so all scales
    return torch.cat(shares, dim=-1)


def differing(quantization: str) -> set[str]:
    """Parameters that are not the same on one rank and on two."""
    one = loaded(quantization, 1, 0)
    two = [loaded(quantization, 2, rank) for rank in range(2)]
    # A weight and its scales: of four attention projections, of a shared, a dense and four routed MLPs.
    assert len(one) == 2 * (4 + 2 + 2 + 2)
    return {
        name
        for name, wholes in one.items()
        for whole, *shares in zip(wholes, *(rank[name] for rank in two), strict=True)
        if not torch.equal(whole, joined(name, shares))
    }


@pytest.mark.parametrize("quantization", ["hunyuan_int8", "hunyuan_int8_w8a8"])
def test_one_rank_or_two(quantization: str) -> None:
    assert differing(quantization) == set()


def test_scales_of_a_ranks_own_part_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(weight: Tensor) -> tuple[Tensor, Tensor]:
        share = weight.chunk(get_tensor_model_parallel_world_size(), dim=1)[get_tensor_model_parallel_rank()]
        _, scale = quantize_per_channel(share)
        return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale

    monkeypatch.setattr(int8, "quantize_per_channel", own)
    changed = differing("hunyuan_int8")
    assert {name for name in changed if any(part in name for part in ROW_PARALLEL)} == {
        f"model.layers.{module}"
        for module in (
            "0.self_attn.o_proj.weight",
            "0.self_attn.o_proj.weight_scale",
            "0.mlp.shared_mlp.down_proj.weight",
            "0.mlp.shared_mlp.down_proj.weight_scale",
            "0.mlp.experts.routed_experts.w2_weight",
            "0.mlp.experts.routed_experts.w2_weight_scale",
            "1.self_attn.o_proj.weight",
            "1.self_attn.o_proj.weight_scale",
            "1.mlp.down_proj.weight",
            "1.mlp.down_proj.weight_scale",
        )
    }


def test_one_tensor_is_in_flight() -> None:
    """A tensor of the checkpoint is gone by the time that the second after it is read."""
    tensors = dict(random_tensors(CONFIG, seed=0))
    alive: list[weakref.ref[Tensor]] = []

    def read() -> Iterator[tuple[str, Tensor]]:
        for name in tensors:
            assert sum(tensor() is not None for tensor in alive) <= 1
            tensor = tensors[name].clone()
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    with meta_model(CONFIG, quantization="hunyuan_int8", device="cpu") as model:
        model.load_weights(read())
    assert len(alive) == len(tensors)


def test_a_pipeline_stage_quantises_its_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    quantised: list[str] = []
    load = int8.Int8Config.load

    def spy(self: int8.Int8Config, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        quantised.append(name)
        return load(self, name, tensor)

    monkeypatch.setattr(int8.Int8Config, "load", spy)
    options = dict(quantization="hunyuan_int8", pipeline_parallel=2, stage=1, device="cpu")
    with meta_model(config, **options) as model:
        loaded = model.load_weights(random_tensors(config, seed=0))
        assert loaded == {name for name, _ in model.named_parameters()}
    assert {name.split(".")[2] for name in quantised if name.startswith("model.layers.")} == {"2", "3"}
