"""What our loaded layers compute in vLLM's Triton kernels, which the interpreter runs on the CPU.

In float16: the interpreter's products of bfloat16 are wrong. What vLLM has between those kernels is `cpu_ops.py`'s.
"""

from types import SimpleNamespace
from typing import Any

import cpu_ops
import pytest
import torch
import triton.language as tl
from checkpoints import random_tensors, tiny_config
from networks import built
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu
from vllm.model_executor.layers.fused_moe import fused_experts
from vllm.model_executor.layers.fused_moe.config import int8_w8a16_moe_quant_config
from vllm.v1.worker.workspace import init_workspace_manager

from hunyuan_vllm.quant.layouts import is_quantised
from hunyuan_vllm.quant.rounding import quantize_per_tensor, unpack_int8

EXPERTS = "model.layers.1.mlp.experts"
NETWORK = tiny_config(num_hidden_layers=2, moe_topk=2)
TENSORS = dict(random_tensors(NETWORK, seed=0))
TOKENS = 5
IDS = torch.tensor([[0, 1], [2, 3], [1, 3], [3, 0], [2, 0]], dtype=torch.int32)
FLOAT16 = dict(device="cpu", dtype="float16")


@pytest.fixture(autouse=True, scope="module")
def operators() -> None:
    cpu_ops.register()
    init_workspace_manager(torch.device("cpu"))


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    """Rows `[tokens, hidden]`, and the weights `[tokens, k]` of the experts IDS."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, NETWORK.hidden_size, generator=generator).half()
    return x, torch.rand(IDS.shape, generator=generator)


def exact(x: Tensor, weights: Tensor) -> Tensor:
    """The experts' output from the checkpoint's own weights, in float32."""
    result = torch.zeros(x.shape)
    for token, (row, ids) in enumerate(zip(x.float(), IDS, strict=True)):
        for weight, expert in zip(weights[token], ids, strict=True):
            projections = f"{EXPERTS}.{expert}."
            gate, up, down = (TENSORS[f"{projections}{part}_proj.weight"].float() for part in ("gate", "up", "down"))
            result[token] += weight * (down @ (silu(gate @ row) * (up @ row)))
    return result


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def test_int8_w8a8_experts(inputs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    # CUDA's own rounding cannot be interpreted; halves go up here and away from zero there.
    monkeypatch.setattr(tl.extra.cuda.libdevice, "round", lambda x: tl.floor(x + 0.5))
    x, weights = inputs
    with built(NETWORK, (9, 0), "int8-w8a8", **FLOAT16) as model:
        model.load_weights(TENSORS.items())
        assert error(computed(model, x, weights), exact(x, weights)) < 0.03


def test_int8_w8a16_experts(inputs: tuple[Tensor, Tensor]) -> None:
    """What Marlin's kernel is handed, by vLLM's Triton kernel for the same: Marlin's own needs a GPU."""
    x, weights = inputs
    with built(NETWORK, (9, 0), "int8", **FLOAT16) as model:
        model.load_weights(TENSORS.items())
        layer = model.get_submodule(f"{EXPERTS}.routed_experts")
        scales = (layer.get_parameter(f"{name}_weight_scale").data.squeeze(-1).float() for name in ("w13", "w2"))
        w1, w2 = (unpack_int8(layer.get_parameter(f"{name}_weight_packed").data, width) for name, width in
                  (("w13", NETWORK.hidden_size), ("w2", NETWORK.intermediate_size)))  # fmt: skip
        described = int8_w8a16_moe_quant_config(*scales, w1_zp=None, w2_zp=None, block_shape=None)
        assert error(fused_experts(x, w1, w2, weights, IDS, quant_config=described), exact(x, weights)) < 0.02


def test_fp8_experts(inputs: tuple[Tensor, Tensor]) -> None:
    x, weights = inputs
    tensors = dict(TENSORS)
    for name in filter(is_quantised, TENSORS):
        # Scales of gate and up are apart, which the layer has to undo.
        spread = 3.0 if "up_proj" in name else 1.0
        scale = spread * TENSORS[name].float().abs().max() / 448
        linear = name.removesuffix("weight")
        tensors[name], tensors[f"{linear}weight_scale"] = quantize_per_tensor(TENSORS[name], scale)
        tensors[f"{linear}input_scale"] = torch.tensor(8 / 448)
    with built(NETWORK, (9, 0), "fp8", moe_backend="triton", **FLOAT16) as model:
        model.load_weights(tensors.items())
        assert error(computed(model, x, weights), exact(x, weights)) < 0.1


def computed(model: Any, x: Tensor, weights: Tensor) -> Tensor:
    """By the layer's own method and the kernel that vLLM has chosen for it."""
    layer = model.get_submodule(f"{EXPERTS}.routed_experts")
    assert layer.quant_method.experts_cls.__name__ == "TritonExperts"
    layer.quant_method.process_weights_after_loading(layer)
    return layer.quant_method.apply(layer, x, weights, IDS, None, None)


@pytest.mark.parametrize("head_dim", [80, 128])
def test_a_cross_layer_reads_its_owner_s_fp8_cache(head_dim: int) -> None:
    """With its owner's scales; with a scale of its own, vLLM's 1, it is off by far."""
    network = tiny_config(num_hidden_layers=2, head_dim=head_dim)
    options = dict(kv_cache_dtype="fp8", attention_backend="TRITON_ATTN", **FLOAT16)
    length, heads, kv_heads = 37, network.num_attention_heads, network.num_key_value_heads
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, count, head_dim) for count in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator).half() for shape in shapes)
    k = (k / k.float().square().mean(dim=-1, keepdim=True).sqrt()).half()  # as the norm leaves it
    blocks = torch.tensor([[2, 1, 3]], dtype=torch.int32)
    metadata = SimpleNamespace(
        num_actual_tokens=length,
        query_start_loc=torch.tensor([0, length], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        max_query_len=length,
        max_seq_len=length,
        block_table=blocks,
        causal=True,
        **dict.fromkeys(
            ("seq_threshold_3D", "num_par_softmax_segments", "softmax_segm_output", "softmax_segm_max",
             "softmax_segm_expsum", "mm_prefix_range_tensor", "rswa_prefix_lens", "rswa_window")
        ),
    )  # fmt: skip
    with built(network, (9, 0), "fp8", **options) as model:
        owner, cross = (model.get_submodule(f"model.layers.{layer}.self_attn.attn") for layer in (0, 1))
        owner.quant_config.cache_scales.keep("model.layers.0.self_attn.v_scale", 0.02)
        for layer in (owner, cross):
            layer.process_weights_after_loading(torch.float16)
        cache = torch.zeros(4, kv_heads, 16, 2 * head_dim, dtype=torch.uint8)
        slots = torch.cat([block * 16 + torch.arange(16) for block in blocks[0]])[:length]
        owner.impl.do_kv_cache_update(owner, k, v, cache, slots)

        def attend() -> Tensor:
            output = torch.zeros_like(q)
            cross.impl.forward(cross, q, None, None, cache, metadata, output)
            return output

        of_queries = [part.float().repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1) for part in (k, v)]
        wanted = scaled_dot_product_attention(q.float().transpose(0, 1), *of_queries, is_causal=True).transpose(0, 1)
        assert error(attend(), wanted) < 0.15
        cross._v_scale.fill_(1.0)
        assert error(attend(), wanted) > 10
