"""What vLLM asks of a model class, and of a model's experts."""

import pytest
from checkpoints import tiny_config, write_checkpoint
from engine import engine
from golden_data import load_golden
from vllm.model_executor.models.interfaces import is_mixture_of_experts, supports_lora, supports_pp

from hunyuan_vllm.model import HunYuanForCausalLM

EXPERT_COUNTS = ("num_moe_layers", "num_logical_experts", "num_physical_experts", "num_local_physical_experts")


def test_interfaces() -> None:
    assert supports_pp(HunYuanForCausalLM)
    assert supports_lora(HunYuanForCausalLM)


@pytest.mark.engine
@pytest.mark.parametrize(("name", "counts"), [("cla2_top2", [4, 4, 4, 4]), ("cla2_dense", [0, 0, 0, 0])])
def test_expert_counts(name: str, counts: list[int]) -> None:
    with engine(load_golden(name).path) as llm:
        assert llm.apply_model(is_mixture_of_experts) == [counts[0] > 0]
        (found,) = llm.apply_model(lambda model: [getattr(model, count) for count in EXPERT_COUNTS])
        assert llm.llm_engine.model_config.is_moe == (counts[0] > 0)
    assert found == counts


@pytest.mark.engine
def test_the_load_balancer_can_take_over_the_experts(tmp_path) -> None:
    """vLLM reads expert weights layer by layer, and maps checkpoint names of experts to parameters."""
    directory = write_checkpoint(tmp_path / "model", tiny_config(num_experts=[4, 1, 4, 4]))

    def inspect(model: HunYuanForCausalLM) -> tuple[int, set[int], set[str]]:
        weights = [list(layer.get_expert_weights()) for layer in model.moe_layers]
        mapping = model.get_expert_mapping()
        return len(weights), {len(tensor) for layer in weights for tensor in layer}, {entry[3] for entry in mapping}

    with engine(directory) as llm:
        assert llm.apply_model(inspect) == [(3, {4}, {"w1", "w2", "w3"})]
