"""vLLM's own Transformers backend on V1 checkpoints, with the plugin installed: `--model-impl transformers`."""

import pytest
import torch
from engine import engine, greatest_difference, score
from golden_data import FLOAT32_TOLERANCE, load_golden

pytestmark = pytest.mark.engine


def implementation(model: torch.nn.Module) -> tuple[str, str]:
    return type(model).__module__.partition(".")[0], type(model.config).__module__.partition(".")[0]


@pytest.mark.parametrize("name", ["v1_moe_tf", "v1_7b"])
def test_it_still_serves_them(name: str) -> None:
    golden = load_golden(name)
    with engine(golden.path, model_impl="transformers") as llm:
        assert llm.apply_model(implementation) == [("vllm", "transformers")]
        results = score(llm, [item.prompt for item in golden.items])
    assert greatest_difference(results, golden) <= FLOAT32_TOLERANCE


def test_a_model_type_that_transformers_lacks() -> None:
    with pytest.raises(ValueError, match="transformers has no model of model_type 'hunyuan': leave the option out"):
        with engine(load_golden("v1_a13b").path, model_impl="transformers"):
            pass
