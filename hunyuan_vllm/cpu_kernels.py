"""Faster bfloat16 kernels for x86 CPUs without AMX, from vLLM's own operators.

vLLM ships two families for packed weights and keeps one of them to AMX machines. It also runs with AVX-512 BF16 alone:
a little faster in decoding, and experts much faster in prefill (benchmarks/cpu_kernels.py).
"""

from __future__ import annotations

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey
from vllm.model_executor.utils import replace_parameter

__all__ = ["PackedCPUExperts", "has_avx512_bf16_without_amx", "packs"]

_REDUCTION_ALIGNMENT = 32  # input features a packed tile takes
_OUTPUT_ALIGNMENT = 16


def has_avx512_bf16_without_amx() -> bool:
    """Whether this is a CPU on which vLLM leaves the packed kernels unused and they run."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def packs(outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether a weight `[outputs, inputs]` has a shape and type the packed linear kernel takes."""
    return (
        dtype == torch.bfloat16
        and inputs % _REDUCTION_ALIGNMENT == 0
        and outputs % _OUTPUT_ALIGNMENT == 0
        and has_avx512_bf16_without_amx()
    )


class PackedCPUExperts(CPUUnquantizedExperts):
    """SiLU-gated bfloat16 experts on the packed kernel; intermediate sizes are padded to a multiple of 32."""

    reduction_alignment = 32

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts],
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        if not has_avx512_bf16_without_amx():
            return False, "packed experts are for CPUs with AVX-512 BF16 and without AMX"
        if moe_config.in_dtype != torch.bfloat16 or moe_config.has_bias:
            return False, "packed experts take bfloat16 without biases"
        if moe_config.activation != MoEActivation.SILU:
            return False, "packed experts compute SiLU"
        return CPUUnquantizedExperts.is_supported_config(cls, moe_config, weight_key, activation_key, activation_format)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._pad_moe_intermediate(layer)
        for name in ("w13_weight", "w2_weight"):
            replace_parameter(layer, name, torch.ops._C.convert_weight_packed(getattr(layer, name)))

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        """`hidden_states` and `output` are `[tokens, hidden]`, `topk_*` `[tokens, k]`; see vLLM's base class."""
        ops.fused_experts_cpu(
            output,
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            ops.CPUQuantMethod.UNQUANT,
            w1_scale=None,
            w2_scale=None,
            w1_zero=None,
            w2_zero=None,
            block_size=None,
        )
