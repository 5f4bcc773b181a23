"""HunYuanForCausalLM for vLLM: grouped-query attention with cross-layer KV sharing, and mixed dense/MoE layers.

A pre-norm decoder built from vLLM's parallel layers. What differs from its relatives is the attention: RoPE first,
then the norms, and one K and one V cached for a whole CLA group (see `attention.py` and `cla_cache.py`).
"""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import (
    get_ep_group,
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear, fused_moe_make_expert_params_mapping
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import (
    EagleModelMixin,
    MixtureOfExperts,
    SupportsEagle3,
    SupportsLoRA,
    SupportsPP,
)
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
    spec_decode_needs_target_embed,
)
from vllm.sequence import IntermediateTensors

from hunyuan_vllm import cpu
from hunyuan_vllm.attention import FoldedQueryNorm, make_rotary, rotate_and_normalize
from hunyuan_vllm.cla_cache import CLAAttention, OwnerAttention, SharedKV, kv_sharing_target, passes_kv
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.expert_load import count_expert_load
from hunyuan_vllm.layout import FUSED
from hunyuan_vllm.loader import CHECKPOINT_NAMES, load_checkpoint
from hunyuan_vllm.patches import apply_patches
from hunyuan_vllm.quant.int8_layers import computes_shared_mlp, join_shared_mlp


class HunYuanMLP(nn.Module):
    """SiLU-gated feed-forward: a dense layer's MLP, or the experts' shared one (then summed by the MoE runner)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool,
        quant_config: QuantizationConfig | None,
        prefix: str,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size,
            [intermediate_size] * 2,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            intermediate_size,
            hidden_size,
            bias=bias,
            skip_bias_add=not reduce_results,
            quant_config=quant_config,
            reduce_results=reduce_results,
            prefix=f"{prefix}.down_proj",
        )
        self.adds_skipped_bias = get_tensor_model_parallel_rank() == 0
        self.act_fn = SiluAndMul()
        self.is_native = cpu.computes_mlp(quant_config, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_native:
            return cpu.native_mlp(x, self.gate_up_proj, self.down_proj)
        gate_up, _ = self.gate_up_proj(x)
        x, skipped_bias = self.down_proj(self.act_fn(gate_up))
        if skipped_bias is not None and self.adds_skipped_bias:  # once among the partial sums
            x = x + skipped_bias
        return x


class HunYuanMoE(nn.Module):
    """Softmax-routed experts plus the shared MLP, which every token passes through.

    The router's weights and logits are float32.
    """

    def __init__(
        self, config: HunYuanConfig, layer: int, quant_config: QuantizationConfig | None, enable_eplb: bool, prefix: str
    ) -> None:
        super().__init__()
        parallel_config = get_current_vllm_config().parallel_config
        self.num_experts = config.experts_at(layer)
        top_k = config.topk_at(layer)
        intermediate_size = config.intermediate_at(layer)

        routes_itself = cpu.has_native_kernels()
        gate = cpu.NativeGate if routes_itself else GateLinear
        self.gate = gate(
            config.hidden_size,
            self.num_experts,
            out_dtype=torch.float32,
            params_dtype=torch.float32,
            prefix=f"{prefix}.gate",
        )
        shared_width = config.shared_width_at(layer)
        self.shared_mlp = (
            HunYuanMLP(
                config.hidden_size,
                shared_width,
                bias=config.mlp_bias,
                quant_config=quant_config,
                prefix=f"{prefix}.shared_mlp",
                reduce_results=False,
            )
            if shared_width
            else None
        )
        width = intermediate_size // get_tensor_model_parallel_world_size()
        joined = computes_shared_mlp(quant_config, f"{prefix}.experts", width, self.shared_mlp)
        with cpu.experts_without_lora_on_cpu():
            self.experts = FusedMoEFactory(
                num_experts=self.num_experts,
                top_k=top_k,
                hidden_size=config.hidden_size,
                intermediate_size=intermediate_size,
                renormalize=config.renormalizes_at(layer),
                custom_routing_function=cpu.choose_experts if routes_itself else None,
                quant_config=quant_config,
                prefix=f"{prefix}.experts",
                enable_eplb=enable_eplb,
                num_redundant_experts=parallel_config.eplb_config.num_redundant_experts,
                has_bias=config.mlp_bias,
                shared_experts=None if joined else self.shared_mlp,
            )
        if joined:
            assert self.shared_mlp is not None
            join_shared_mlp(self.experts, self.shared_mlp)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        router_logits, _ = self.gate(hidden_states)
        return self.experts(hidden_states=hidden_states, router_logits=router_logits)


class HunYuanAttention(nn.Module):
    """Grouped-query attention of an owner layer, or of a cross layer that reads its owner's cache.

    An owner projects q, k, v, rotates q and k and caches k̂ (k divided by its rms, no weight) and v. A cross layer
    projects q only. Both normalise q with their own folded weight.
    """

    def __init__(
        self,
        config: HunYuanConfig,
        layer: int,
        rotary_emb: RotaryEmbedding,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        total_heads, total_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.num_heads = total_heads // tp_size
        self.num_kv_heads = max(1, total_kv_heads // tp_size)  # fewer KV heads than ranks: each is held several times
        self.is_cross = config.is_cross(layer)
        self.passes_kv = passes_kv()
        self.rotary_emb = rotary_emb

        if self.is_cross:
            self.q_proj = ColumnParallelLinear(
                config.hidden_size,
                total_heads * self.head_dim,
                bias=config.attention_bias,
                quant_config=quant_config,
                prefix=f"{prefix}.q_proj",
            )
        else:
            self.qkv_proj = QKVParallelLinear(
                config.hidden_size,
                self.head_dim,
                total_heads,
                total_kv_heads,
                bias=config.attention_bias,
                quant_config=quant_config,
                prefix=f"{prefix}.qkv_proj",
            )
        self.o_proj = RowParallelLinear(
            total_heads * self.head_dim,
            config.hidden_size,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.qk_norm = self.unit_norm = None
        if config.use_qk_norm:
            self.qk_norm = FoldedQueryNorm(self.head_dim, config.rms_norm_eps)
            self.unit_norm = RMSNorm(self.head_dim, config.rms_norm_eps, has_weight=False)
        attention = CLAAttention if self.is_cross else OwnerAttention
        self.attn = attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            kv_sharing_target_layer_name=kv_sharing_target(config, layer, f"{prefix}.attn"),
            config=config,
            layer=layer,
            q_amax=self.qk_norm.bound if self.qk_norm else None,
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, shared_kv: SharedKV
    ) -> tuple[torch.Tensor, SharedKV]:
        norms = self.qk_norm, self.unit_norm
        if self.is_cross:
            q, _ = self.q_proj(hidden_states)
            q, _ = rotate_and_normalize(q, positions, self.rotary_emb, *norms, self.num_heads, 0)
        else:
            qkv, _ = self.qkv_proj(hidden_states)
            kv_size = self.num_kv_heads * self.head_dim
            qk, v = qkv.split([self.num_heads * self.head_dim + kv_size, kv_size], dim=-1)
            q, k = rotate_and_normalize(qk, positions, self.rotary_emb, *norms, self.num_heads, self.num_kv_heads)
            shared_kv = (k, v)
        output = self.attn(q, *shared_kv)
        output, _ = self.o_proj(output)
        return output, shared_kv if self.passes_kv else (None, None)


class HunYuanDecoderLayer(nn.Module):
    """x += attn(rms(x)); x += mlp(rms(x)), with the residual carried beside the hidden states."""

    def __init__(
        self, config: HunYuanConfig, rotary_emb: RotaryEmbedding, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        layer = int(prefix.rsplit(".", 1)[-1])
        quant_config = vllm_config.quant_config
        self.self_attn = HunYuanAttention(
            config, layer, rotary_emb, vllm_config.cache_config, quant_config, prefix=f"{prefix}.self_attn"
        )
        self.mlp: HunYuanMoE | HunYuanMLP
        if config.experts_at(layer) > 1:
            enable_eplb = vllm_config.parallel_config.enable_eplb
            self.mlp = HunYuanMoE(config, layer, quant_config, enable_eplb, prefix=f"{prefix}.mlp")
        else:
            self.mlp = HunYuanMLP(
                config.hidden_size, config.intermediate_at(layer), config.mlp_bias, quant_config, prefix=f"{prefix}.mlp"
            )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        shared_kv: SharedKV,
    ) -> tuple[torch.Tensor, torch.Tensor, SharedKV]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states, shared_kv = self.self_attn(positions, hidden_states, shared_kv)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual, shared_kv


@support_torch_compile
class HunYuanModel(nn.Module, EagleModelMixin):
    """Embedding, decoder layers of this pipeline stage, final norm."""

    supports_aux_hidden_states_over_pp = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: HunYuanConfig = vllm_config.model_config.hf_config
        self.config = config
        self.quant_config = vllm_config.quant_config
        pp_group = get_pp_group()
        needed_last = config.tie_word_embeddings or spec_decode_needs_target_embed(vllm_config)
        if pp_group.is_first_rank or (needed_last and pp_group.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
            )
        else:
            self.embed_tokens = PPMissingLayer()
        rotary_emb = make_rotary(config, vllm_config.model_config.max_model_len)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: HunYuanDecoderLayer(config, rotary_emb, vllm_config, prefix=prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if pp_group.is_last_rank else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states `[tokens, hidden_size]` of the tokens at `positions` (`[tokens]`).

        Where EAGLE-3 asks for `aux_hidden_state_layers`, also the inputs of those layers.
        """
        auxiliary = self.collect_remote_aux_hidden_states(intermediate_tensors)  # type: ignore[operator]
        local: list[torch.Tensor] = []
        if get_pp_group().is_first_rank:
            if inputs_embeds is None:
                assert input_ids is not None
                inputs_embeds = self.embed_input_ids(input_ids)
            hidden_states, residual = inputs_embeds, None
            self._maybe_add_hidden_state(local, self.start_layer, hidden_states, residual)  # type: ignore[operator]
        else:
            assert intermediate_tensors is not None
            hidden_states = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]
        shared_kv: SharedKV = (None, None)
        for number, layer in enumerate(islice(self.layers, self.start_layer, self.end_layer), self.start_layer + 1):
            hidden_states, residual, shared_kv = layer(positions, hidden_states, residual, shared_kv)
            self._maybe_add_hidden_state(local, number, hidden_states, residual)  # type: ignore[operator]
        if not get_pp_group().is_last_rank:
            packed = self.pack_local_aux_hidden_states(local)  # type: ignore[operator]
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual, **packed})
        hidden_states, _ = self.norm(hidden_states, residual)
        return (hidden_states, auxiliary + local) if auxiliary or local else hidden_states


class HunYuanForCausalLM(nn.Module, SupportsPP, SupportsLoRA, SupportsEagle3, MixtureOfExperts):
    """The Hunyuan networks as vLLM runs them. `hf_config` must be a `HunYuanConfig`."""

    packed_modules_mapping = {name: list(FUSED[name]) for name in ("qkv_proj", "gate_up_proj")}
    hf_to_vllm_mapper = CHECKPOINT_NAMES

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        apply_patches()
        config: HunYuanConfig = vllm_config.model_config.hf_config
        if vllm_config.model_config.word_embeddings_untied_by_checkpoint:
            # vLLM unties where a checkpoint brings a head of its own; in a tied Hunyuan network that copy is not used.
            config.tie_word_embeddings = True
            vllm_config.model_config.word_embeddings_untied_by_checkpoint = False
        self.config, self.vllm_config, self.quant_config = config, vllm_config, vllm_config.quant_config
        self.model = HunYuanModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        count_expert_load(self.model, vllm_config)
        if not get_pp_group().is_last_rank:
            self.lm_head = PPMissingLayer()
        elif config.tie_word_embeddings:
            # Not another layer with its weight: on CPUs that one would keep, packed, the weight from before a reload.
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        # Weights pushed into a model that began with dummy ones come in parts.
        self.expects_whole_checkpoint = vllm_config.load_config.load_format != "dummy"
        self._describe_experts()

    def _describe_experts(self) -> None:
        """What vLLM's expert-parallel load balancer asks of a model."""
        blocks = [layer.mlp for layer in self.model.layers if isinstance(getattr(layer, "mlp", None), HunYuanMoE)]
        self.moe_layers = [block.experts for block in blocks]
        self.expert_weights: list[list[torch.Tensor]] = []
        self.num_moe_layers, self.num_expert_groups = len(blocks), 1
        self.num_shared_experts = int(bool(blocks) and blocks[0].shared_mlp is not None)
        self.num_logical_experts = self.num_routed_experts = blocks[0].num_experts if blocks else 0
        self.num_redundant_experts = self.vllm_config.parallel_config.eplb_config.num_redundant_experts if blocks else 0
        self.num_physical_experts = self.num_logical_experts + self.num_redundant_experts
        self.num_local_physical_experts = self.num_physical_experts // get_ep_group().world_size if blocks else 0

    def update_physical_experts_metadata(self, num_physical_experts: int, num_local_physical_experts: int) -> None:
        """Follow a change of the number of expert replicas."""
        self.num_physical_experts = num_physical_experts
        self.num_local_physical_experts = num_local_physical_experts
        self.num_redundant_experts = num_physical_experts - self.num_logical_experts
        for experts in self.moe_layers:
            experts.update_expert_map()

    def get_expert_mapping(self) -> list[tuple[str, str, int, str]]:
        """(parameter, checkpoint name, expert, shard) of every expert's tensors, for LoRA and quantised loaders."""
        return fused_moe_make_expert_params_mapping(
            self,
            ckpt_gate_proj_name="gate_proj",
            ckpt_down_proj_name="down_proj",
            ckpt_up_proj_name="up_proj",
            num_experts=self.num_logical_experts,
            num_redundant_experts=self.num_redundant_experts,
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors under their checkpoint names, in any order; returns the parameters that were filled.

        Raises:
            CheckpointError: a tensor is unknown, missing, misshapen or not finite; the message names it.
        """
        return load_checkpoint(self, weights)
