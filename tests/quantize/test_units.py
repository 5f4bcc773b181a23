"""Every tensor is in one unit, with what it is fused with."""

from __future__ import annotations

import pytest
from checkpoints import VARIANTS, tiny_config

from hunyuan_vllm.layout import expected_tensors
from hunyuan_vllm.quantize.source import input_of, kept_linears, layer_of, place, units


@pytest.mark.parametrize("variant", [{}, *VARIANTS.values()], ids=["tiny", *VARIANTS])
def test_each_tensor_once(variant: dict) -> None:
    config = tiny_config(**variant)
    names = [name for unit in units(config) for name in unit.names]
    assert sorted(names) == sorted(expected_tensors(config))
    for unit in units(config):
        assert all(name.endswith("_proj.weight") == unit.quantised for name in unit.names)
        assert len({layer_of(name) for name in unit.names}) == 1


def test_what_is_fused_is_together() -> None:
    found = {unit.names[0]: unit.names for unit in units(tiny_config()) if unit.quantised}
    attention, experts = "model.layers.0.self_attn.", "model.layers.1.mlp.experts.2."
    assert found[f"{attention}q_proj.weight"] == tuple(f"{attention}{part}_proj.weight" for part in "qkv")
    assert found["model.layers.1.self_attn.q_proj.weight"] == ("model.layers.1.self_attn.q_proj.weight",)
    assert found[f"{experts}gate_proj.weight"] == tuple(f"{experts}{part}_proj.weight" for part in ("gate", "up"))
    assert found[f"{experts}down_proj.weight"] == (f"{experts}down_proj.weight",)


def test_projections_with_the_same_input_scale() -> None:
    layer = "model.layers.11."
    same = [f"{layer}mlp.experts.{e}.{part}_proj.weight" for e in (0, 13) for part in ("gate", "up")]
    assert {input_of(name) for name in same} == {"mlp.experts.gate_proj"}
    assert {input_of(f"{layer}self_attn.{part}_proj.weight") for part in "qkv"} == {"self_attn.q_proj"}
    assert input_of("mlp.shared_mlp.up_proj") == "mlp.shared_mlp.gate_proj" != input_of(same[0])
    assert place(same[2]) == (11, "mlp.experts.13.gate_proj.weight")


def test_linears_that_stay() -> None:
    config = tiny_config(**VARIANTS["per_layer_fields"])
    routers = [f"model.layers.{layer}.mlp.gate.wg" for layer in (0, 2, 3)]  # layer 1 is dense
    assert kept_linears(config) == ["lm_head", *routers]
