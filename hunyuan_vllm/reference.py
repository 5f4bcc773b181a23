"""The Hunyuan networks in plain PyTorch, straight from the definition: the engine's independent check, and trainable.

Nothing here is folded, fused or shared with the engine's model; module names are the published tensor names.
"""

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from hunyuan_vllm.checkpoint import local_directory, read_weights
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import Layout


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) in float32 or wider, rounded to x's type, times weight; over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_frequencies(config: HunYuanConfig, length: int) -> Tensor:
    """Radians a position of each pair of a head's dimensions, float32, [head_dim / 2].

    Plain RoPE is rounded to bfloat16 in Hunyuan-Large, as it was trained, and not in V1. "dynamic" with alpha raises
    the base to theta·alpha^(d/(d-2)) whatever the length; with factor alone the base grows once `length` (tokens so
    far) passes max_position_embeddings (the NTK formula). "linear" and "dynamic" with factor are the textbook ones,
    unrounded, as in vLLM: no published checkpoint has them.
    """
    rope, d = config.rope_parameters, config.head_dim
    base = rope["rope_theta"]
    if "alpha" in rope:
        base *= rope["alpha"] ** (d / (d - 2))
    elif rope["rope_type"] == "dynamic" and length > config.max_position_embeddings:
        factor = rope["factor"]
        base *= (factor * length / config.max_position_embeddings - (factor - 1)) ** (d / (d - 2))
    frequencies = 1.0 / base ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    rounded = rope["rope_type"] == "default" and not config.is_v1
    return frequencies.bfloat16().float() if rounded else frequencies


def rotation(config: HunYuanConfig, positions: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for `positions` [batch, tokens], each [batch, 1, tokens, head_dim]."""
    steps = positions.float()
    if config.rope_parameters["rope_type"] == "linear":
        steps = steps / config.rope_parameters["factor"]
    angles = steps[:, None, :, None] * inverse_frequencies(config, length).to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (j, j + head_dim / 2) of every head; x is [batch, heads, tokens, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention, [batch, heads, tokens, head_dim]; without a mask causal, or one token that sees all."""
    if q.shape[2] > 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    # One token: the query heads of a KV head become the rows of one small attention, and no K or V is repeated.
    batch, heads, _, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], head_dim)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)


class Attention(nn.Module):
    """Self-attention of an owner layer, or of a cross layer, which has no k_proj and v_proj."""

    def __init__(self, config: HunYuanConfig, layer: int) -> None:
        super().__init__()
        hidden, self.head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.layer, self.is_cross = layer, config.is_cross(layer)
        self.q_proj = nn.Linear(hidden, q_size, bias=bias)
        if not self.is_cross:
            self.k_proj = nn.Linear(hidden, kv_size, bias=bias)
            self.v_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, hidden, bias=bias)
        self.query_layernorm: nn.Module = nn.Identity()
        self.key_layernorm: nn.Module = nn.Identity()
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        shared_k: Tensor | None,
        shared_v: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        past_key_values: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the output and the group's K (RoPE'd, un-normed) and V, for the cross layers that follow.

        x is [batch, tokens, hidden]; shared_k and shared_v, [batch, kv_heads, all tokens, head_dim], are the owner's.
        """
        q = apply_rope(self._heads(self.q_proj(x)), cos, sin)
        if self.is_cross:
            assert shared_k is not None and shared_v is not None
            k, v = shared_k, shared_v
        else:
            k, v = apply_rope(self._heads(self.k_proj(x)), cos, sin), self._heads(self.v_proj(x))
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer)
        out = attend(self.query_layernorm(q), self.key_layernorm(k), v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2)), k, v

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)): a dense MLP, one expert, or the shared experts together."""

    def __init__(self, hidden: int, width: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Float32Linear(nn.Linear):
    """Computes in float32 (or wider) under autocast too, with a weight that no cast of the model makes narrower."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = at_least_float32(self.weight)  # narrower only where it was replaced, as DeepSpeed does
            return F.linear(x.to(weight.dtype), weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        exact = self.weight.data
        super()._apply(fn, recurse)
        if self.weight.dtype.itemsize < torch.float32.itemsize:
            self.weight.data = exact.to(self.weight.device)
        return self


class Router(nn.Module):
    """Expert logits, in float32."""

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.wg = Float32Linear(hidden, experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.wg(x)


def route(logits: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Weights and expert ids, [tokens, topk]: the probabilities, or these divided by their sum."""
    weights, ids = logits.softmax(-1).topk(topk, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), ids


class MoE(nn.Module):
    """Routed experts plus, where the config has one, the shared MLP that every token passes."""

    def __init__(self, config: HunYuanConfig, layer: int) -> None:
        super().__init__()
        hidden, width, shared = config.hidden_size, config.intermediate_at(layer), config.shared_width_at(layer)
        self.topk, self.renormalizes = config.topk_at(layer), config.renormalizes_at(layer)
        self.gate = Router(hidden, config.experts_at(layer))
        self.shared_mlp = MLP(hidden, shared, config.mlp_bias) if shared else None
        self.experts = nn.ModuleList(MLP(hidden, width, config.mlp_bias) for _ in range(config.experts_at(layer)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output, shaped as x, and the router's logits, [tokens, experts]."""
        tokens = x.flatten(0, -2)
        logits = self.gate(tokens)
        weights, ids = route(logits, self.topk, self.renormalizes)
        # Sort the (token, choice) pairs by expert, so that each expert reads its own tokens once.
        order = ids.flatten().argsort(stable=True)
        counts = ids.flatten().bincount(minlength=len(self.experts)).tolist()
        inputs = tokens[order // self.topk].split(counts)
        # In training an expert without tokens still runs (on none), so that every parameter has a gradient.
        outputs = [
            expert(part) for expert, part in zip(self.experts, inputs, strict=True) if self.training or len(part)
        ]
        chosen = torch.cat(outputs)[order.argsort()].unflatten(0, ids.shape)  # [tokens, topk, hidden]
        out = (chosen * weights.unsqueeze(-1).to(chosen.dtype)).sum(1).view(x.shape)
        return (out if self.shared_mlp is None else out + self.shared_mlp(x)), logits


class DecoderLayer(GradientCheckpointingLayer):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: HunYuanConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp: MoE | MLP
        if config.experts_at(layer) > 1:
            self.mlp = MoE(config, layer)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_at(layer), config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        shared_k: Tensor | None,
        shared_v: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        past_key_values: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As `Attention.forward`, and the router's logits, or None from a dense layer."""
        normed = self.input_layernorm(x)
        attended, k, v = self.self_attn(normed, shared_k, shared_v, cos, sin, mask, past_key_values)
        x = x + attended
        fed = self.mlp(self.post_attention_layernorm(x))
        out, logits = fed if isinstance(fed, tuple) else (fed, None)
        return x + out, k, v, logits


class HunYuanPreTrainedModel(PreTrainedModel):
    """What Hugging Face's machinery has to know of this architecture."""

    config_class = HunYuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["mlp.gate.wg"]
    _supports_sdpa = True


class HunYuanModel(HunYuanPreTrainedModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: HunYuanConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> MoeModelOutputWithPast:
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.training and any(layer.gradient_checkpointing for layer in self.layers):
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        total = past + x.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, total, device=x.device).unsqueeze(0)
        cos, sin = rotation(self.config, position_ids, total, x.dtype)
        mask = visible(attention_mask, x.shape[1], total, x.device)
        k: Tensor | None = None
        v: Tensor | None = None
        router_logits = []
        for layer in self.layers:
            x, k, v, logits = layer(x, k, v, cos, sin, mask, past_key_values=past_key_values)
            if logits is not None:
                router_logits.append(logits)
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values, router_logits=tuple(router_logits)
        )


def visible(attention_mask: Tensor | None, queries: int, total: int, device: torch.device) -> Tensor | None:
    """Which of `total` tokens each of the last `queries` sees, boolean [batch or 1, 1, queries, total].

    None where SDPA's own causal mask, or no mask at all, says the same.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    if attention_mask is not None and attention_mask.all():
        attention_mask = None
    if attention_mask is None and queries in (1, total):
        return None
    causal = torch.ones(queries, total, dtype=torch.bool, device=device).tril(total - queries)
    if attention_mask is None:
        return causal[None, None]
    # A padding token sees itself: a row of nothing but -inf would be NaN.
    itself = torch.eye(total, dtype=torch.bool, device=device)[total - queries :]
    return causal & attention_mask[:, None, None, :].bool() | itself


class HunYuanForCausalLM(HunYuanPreTrainedModel, GenerationMixin):
    """The language model. `from_pretrained` and `save_pretrained` read and write published checkpoints."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HunYuanConfig) -> None:
        super().__init__(config)
        self.model = HunYuanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [batch, tokens, vocab], and the mean cross entropy where `labels` are given.

        Args:
            input_ids: [batch, tokens].
            attention_mask: 1 for a token and 0 for padding, [batch, cached + new tokens]; or boolean, what sees what,
                [batch, 1, tokens, cached + new tokens], for packed sequences.
            position_ids: [batch, tokens]; counted on from the cache where absent.
            past_key_values: a transformers Cache; only owner layers write to it, K RoPE'd and un-normed.
            labels: [batch, tokens], shifted here; -100 is ignored.
            use_cache: make and return a `DynamicCache` where none is given.
            logits_to_keep: only the last that many positions, 0 for all.

        `router_logits` of the result holds [batch · tokens, experts] for each MoE layer.
        """
        hidden = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        logits = self.lm_head(hidden.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=hidden.past_key_values,
            router_logits=hidden.router_logits,
        )

    @torch.inference_mode()
    def greedy(
        self, input_ids: Tensor, max_new_tokens: int, *, stop_ids: tuple[int, ...] = (), use_cache: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The likeliest continuation of `input_ids` [batch, tokens], prompts of one length.

        Returns tokens and their log-probabilities, [batch, new tokens]; ends early once every row has had a stop token
        (what a row holds after its stop token means nothing).
        """
        cache = DynamicCache() if use_cache else None
        tokens, logprobs = [], []
        stopped = torch.zeros(len(input_ids), 1, dtype=torch.bool, device=input_ids.device)
        stops = torch.tensor(stop_ids, dtype=input_ids.dtype, device=input_ids.device)
        given = input_ids
        for _ in range(max_new_tokens):
            logits = self(given, past_key_values=cache, logits_to_keep=1).logits[:, 0].float()
            best = logits.log_softmax(-1).max(-1, keepdim=True)
            tokens.append(best.indices)
            logprobs.append(best.values)
            stopped |= torch.isin(best.indices, stops)
            if stopped.all():
                break
            given = best.indices if use_cache else torch.cat((given, best.indices), dim=1)
        return torch.cat(tokens, dim=1), torch.cat(logprobs, dim=1)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path | None, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Load a published-layout checkpoint from a directory or the hub; the arguments are `PreTrainedModel`'s."""
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        directory = local_directory(pretrained_model_name_or_path, kwargs)
        if not isinstance(config, HunYuanConfig):
            config, kwargs = HunYuanConfig.from_pretrained(config or directory, return_unused_kwargs=True, **kwargs)
        if "generation_config" not in kwargs and (directory / "generation_config.json").exists():
            kwargs["generation_config"] = GenerationConfig.from_pretrained(directory)
        loaded = super().from_pretrained(
            None, *model_args, config=config, state_dict=read_weights(directory, Layout(config)), **kwargs
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        return loaded
