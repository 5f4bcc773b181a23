"""A step branches on no tensor's value and fetches none to the host: CUDA graphs could not hold it.

The published network runs on the meta device, where tensors have no values, so that either raises.
"""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from networks import NETWORKS, built
from vllm.config import get_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.platforms import current_platform

from hunyuan_vllm.expert_load import EXTENSION, _Count

TOKENS = 1024
# Operators of the wheel that write into tensors they are given, and of which torch knows no form without values.
WITHOUT_META = {
    "_C": (
        "silu_and_mul",
        "vocab_parallel_embedding",
        "rotary_embedding",
        "dynamic_scaled_int8_quant",
        "static_scaled_fp8_quant",
        "cutlass_scaled_mm",
    ),
    "vllm": ("unified_attention_with_output",),
}


@pytest.fixture(autouse=True, scope="module")
def meta_operators() -> Iterator[None]:
    current_platform.import_kernels()
    libraries = []
    for namespace, names in WITHOUT_META.items():
        library = torch.library.Library(namespace, "IMPL")
        for name in names:
            library.impl(name, lambda *_, **__: None, "Meta")
        libraries.append(library)
    yield
    for library in libraries:
        library._destroy()


# Linear layers of "int8" at 9.0 are Humming's, which fit weights to the device they ask: at 8.0 Marlin's run.
@pytest.mark.parametrize(
    ("scheme", "capability"), [("bf16", (9, 0)), ("int8", (8, 0)), ("int8-w8a8", (9, 0)), ("fp8", (9, 0))]
)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_reads_no_value(network: str, scheme: str, capability: tuple[int, int]) -> None:
    # While loading, FP8 experts warn by value if their inputs' scales differ.
    greatest = patch(
        "hunyuan_vllm.quant.fp8_layers.process_fp8_input_tensor_strategy_moe", lambda w13, w2, _: (w13.max(), w2.max())
    )
    config = NETWORKS[network]
    with greatest, built(config, capability, scheme, tensor_parallel=8) as model:
        vllm_config = get_current_vllm_config()
        process_weights_after_loading(model, vllm_config.model_config, torch.device("meta"))
        with torch.inference_mode(), torch.device("meta"), set_forward_context(None, vllm_config, num_tokens=TOKENS):
            ids = torch.zeros(TOKENS, dtype=torch.long)
            hidden = model(ids, ids)
            assert hidden.is_meta and hidden.shape == (TOKENS, config.hidden_size)


def test_counting_the_load_of_experts_reads_no_value() -> None:
    with built(NETWORKS["Hunyuan-Large"], (9, 0), "bf16", worker_extension_cls=EXTENSION) as model:
        routers = [module.router for module in model.modules() if hasattr(module, "router")]
        assert len(routers) == 2 and all(isinstance(router.capture_fn, _Count) for router in routers)
        vllm_config = get_current_vllm_config()
        with torch.device("meta"):
            padding, chosen = torch.zeros(TOKENS, dtype=torch.bool), torch.zeros(TOKENS, 1, dtype=torch.int32)
        with set_forward_context(None, vllm_config, num_tokens=TOKENS, is_padding=padding):
            routers[0].capture_fn(chosen)
