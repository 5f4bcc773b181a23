"""What the model does differently on CPUs: bfloat16 kernels, routing, and LoRA without Triton"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from hunyuan_vllm import __version__, envs
from hunyuan_vllm.adapter import ATTENTION
from hunyuan_vllm.cpu_kernels import EXPERTS, LINEAR, Kernel, kernel
from hunyuan_vllm.native import operators
from hunyuan_vllm.quant.schemes import BF16, FP8, INT8, INT8_W8A8


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
        if kernel(BF16, EXPERTS) is not Kernel.PACKED:
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


class NativeCPUExperts(CPUUnquantizedExperts):
    """SiLU-gated bfloat16 experts on our kernel, of any size."""

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts],
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        if moe_config.in_dtype != torch.bfloat16 or moe_config.has_bias:
            return False, "our experts take bfloat16 without biases"
        if moe_config.activation != MoEActivation.SILU:
            return False, "our experts compute SiLU"
        if kernel(BF16, EXPERTS) is not Kernel.OURS:
            return False, "our experts are for CPUs with AVX2 and without AVX-512"
        return mk.FusedMoEExperts.is_supported_config(cls, moe_config, weight_key, activation_key, activation_format)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        for name in ("w13_weight", "w2_weight"):
            replace_parameter(layer, name, torch.ops.hunyuan_vllm.bf16_pack_experts(getattr(layer, name)))

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: object,
        **__: object,
    ) -> None:
        """`hidden_states` and `output` are `[tokens, hidden]`, `topk_*` `[tokens, k]`; see vLLM's base class."""
        width = self.moe_config.intermediate_size_per_partition
        gates, ids = topk_weights.float().contiguous(), topk_ids.int().contiguous()
        output.copy_(torch.ops.hunyuan_vllm.bf16_experts(hidden_states, w1, w2, gates, ids, width, None, None))


def _multiplies_linears() -> bool:
    return kernel(BF16, LINEAR) is Kernel.OURS


def multiply_natively(layer: Any, remove_weight: bool) -> bool:
    """Let our kernel compute a linear layer, as vLLM's `dispatch_cpu_unquantized_gemm` does; whether it will."""
    weight = layer.weight
    if weight.is_meta or weight.ndim != 2 or weight.dtype != torch.bfloat16 or not _multiplies_linears():
        return False
    packed = torch.ops.hunyuan_vllm.bf16_pack_experts(weight.unsqueeze(0)).squeeze(0)
    outputs = weight.shape[0]
    if getattr(layer, "bias", None) is not None:
        layer.bias.data = layer.bias.float()
    if remove_weight:
        replace_parameter(layer, "weight", packed)

    def cpu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # A parameter's place in memory outlives a reload, which code that is compiled relies on.
        y = torch.ops.hunyuan_vllm.bf16_linear(rows, weight if remove_weight else packed, bias, outputs)
        return y.view(*x.shape[:-1], outputs)

    layer.cpu_linear = cpu_linear
    return True


def computes_mlp(quant_config: object, bias: bool) -> bool:
    """Whether `native_mlp` computes the MLP that is being built."""
    natively = current_platform.is_cpu() and torch.get_default_dtype() == torch.bfloat16
    return natively and quant_config is None and not bias and _multiplies_linears()


def native_mlp(x: Tensor, gate_up_proj: Any, down_proj: Any) -> Tensor:
    """down(silu(gate) ⊙ up), `[tokens, hidden]`: the sum over the ranks, where `down_proj` makes it."""
    width = down_proj.input_size_per_partition
    y = torch.ops.hunyuan_vllm.bf16_mlp(x, gate_up_proj.weight, down_proj.weight, width)
    return tensor_model_parallel_all_reduce(y) if down_proj.reduce_results and down_proj.tp_size > 1 else y


def has_native_kernels() -> bool:
    """Whether the model that is being built rotates, normalises and routes by our kernels."""
    return current_platform.is_cpu() and torch.get_default_dtype() == torch.bfloat16 and operators.available()


class _KeptWeight(UnquantizedLinearMethod):
    """Leaves the weight as it is loaded: vLLM packs it for another kernel."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass


class NativeGate(GateLinear):
    """A router's linear: float32 logits `[tokens, experts]` of bfloat16 rows, with a float32 weight."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quant_method = _KeptWeight()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.ops.hunyuan_vllm.router_logits(x, self.weight), None


def choose_experts(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """vLLM's `custom_routing_function`: float32 weights and int32 ids, `[tokens, topk]`, by softmax."""
    return torch.ops.hunyuan_vllm.choose_experts(gating_output, topk, renormalize)


logger = init_logger(f"vllm.{__name__}")


def limit_targets_on_cpu(vllm_config: VllmConfig) -> None:
    """Restrict `--lora-target-modules` to attention on CPUs.

    Raises:
        ValueError: the user asked for other modules there.
    """
    lora = vllm_config.lora_config
    if lora is None or not current_platform.is_cpu():
        return
    if lora.target_modules is None:
        lora.target_modules = list(ATTENTION)
        logger.info("LoRA on CPUs acts on attention (%s) only", ", ".join(ATTENTION))
    elif others := sorted(set(lora.target_modules) - set(ATTENTION)):
        raise ValueError(f"--lora-target-modules {' '.join(others)} is not possible on CPUs: use {' '.join(ATTENTION)}")


@contextmanager
def experts_without_lora_on_cpu() -> Iterator[None]:
    """Build experts as if LoRA were off, on CPUs: with it on, vLLM picks its Triton kernel whatever the targets."""
    vllm_config = get_current_vllm_config()
    lora = vllm_config.lora_config
    if current_platform.is_cpu():
        vllm_config.lora_config = None
    try:
        yield
    finally:
        vllm_config.lora_config = lora


def key_compiled_code(vllm_config: VllmConfig) -> None:
    """Add what our compiled code depends on to the key of vLLM's cache of it.

    vLLM's key has its own config and variables only. On CPUs it loads compiled code without checking guards, from a
    cache that machines of several kinds may share.
    """
    schemes = (BF16, FP8, INT8, INT8_W8A8)
    if current_platform.is_cpu() and isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config["hunyuan_vllm"] = {
            "version": __version__,
            "cpu": [name for name, there in torch.cpu.get_capabilities().items() if there is True],
            "cla_sharing": envs.cla_sharing(),
            "native_kernels": envs.native_kernels(),
            "kernels": [kernel(scheme, layer) for scheme in schemes for layer in (LINEAR, EXPERTS)],
            "worker_extension": vllm_config.parallel_config.worker_extension_cls,
        }
