"""The networks and schemes of the bench. A further network is a row of NETWORKS and its rows of test_kernels.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from checkpoints import ALPHA_ROPE
from fake_cuda import fake_cuda
from meta_model import meta_model
from method_checkpoints import FORMATS
from vllm import _custom_ops as ops
from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.attention.backends import flashinfer

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.model import HunYuanForCausalLM
from hunyuan_vllm.network import ARCHITECTURES
from hunyuan_vllm.plugin import register

E4M3_STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
SCHEMES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"quantization": "hunyuan_int8"},
    "int8-w8a8": {"quantization": "hunyuan_int8_w8a8"},
    "fp8": {"quantization_config": E4M3_STATIC},
    "gptq-int4": {"quantization_config": FORMATS["gptq"][0] | {"group_size": 128}},
}
V1 = dict(
    torch_dtype="bfloat16", vocab_size=128167, hidden_size=4096, num_hidden_layers=2, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=32768, tie_word_embeddings=True, use_qk_norm=True,
    rope_scaling=ALPHA_ROPE,
)  # fmt: skip
NETWORKS: dict[str, HunYuanConfig] = {
    "Hunyuan-Large": HunYuanConfig(
        architectures=["HunYuanForCausalLM"], torch_dtype="bfloat16", vocab_size=129024, hidden_size=6400,
        intermediate_size=18304, num_hidden_layers=2, num_attention_heads=80, num_key_value_heads=8, num_experts=16,
        use_mixed_mlp_moe=True, use_cla=True, cla_share_factor=2, use_qk_norm=True, tie_word_embeddings=True,
    ),
    "Hunyuan-A13B": HunYuanConfig(
        model_type="hunyuan_v1_moe", architectures=["HunYuanMoEV1ForCausalLM"], intermediate_size=3072,
        moe_intermediate_size=3072, num_experts=64, moe_topk=8, num_shared_expert=1, **V1,
    ),
    "Hunyuan-7B": HunYuanConfig(
        model_type="hunyuan_v1_dense", architectures=["HunYuanDenseV1ForCausalLM"], intermediate_size=14336, **V1,
    ),
}  # fmt: skip


@contextmanager
def built(config: HunYuanConfig, capability: tuple[int, int], scheme: str, **options: Any) -> Iterator[Any]:
    """The model of a rank as a GPU of this capability has it, before its weights are loaded; see `meta_model`."""
    register()
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, HunYuanForCausalLM)  # no process that imports it to look at it
    # The wheel asks the driver whether it may; the answer is that of every driver that CUDA 12 and newer need.
    supports_fp8 = patch.object(ops, "cutlass_scaled_mm_supports_fp8", lambda capability: capability >= 89)
    # FlashInfer's attention allocates a buffer on the device when it is made, by the number of its multiprocessors.
    counters = {"get_device_sm_count": lambda device: 148, "_get_multi_ctas_kv_counter_buffer": lambda *_: None}
    on_device = patch.multiple(flashinfer, create=True, **counters)
    with supports_fp8, on_device, fake_cuda(*capability), meta_model(config, **SCHEMES[scheme], **options) as model:
        yield model
