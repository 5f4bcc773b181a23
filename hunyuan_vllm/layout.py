"""What a Hunyuan checkpoint holds: every tensor's name and shape, derived from the config.

Knows the spellings that occur in published files (fused projections, stray biases, rotary buffers) and names whatever
does not fit. No torch: shapes are enough, so whole checkpoints are checked from their headers.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import accumulate, count, takewhile
from typing import Any

from hunyuan_vllm.network import Network

Shape = tuple[int, ...]

FLOATS = ("BF16", "F16", "F32")  # as safetensors' headers spell them

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_and_up_proj": ("up_proj", "gate_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),  # the engine's own; no published file has it
}
"""Fused projections and their parts, in the order of the rows; those of qkv_proj alternate by KV head in files."""

STACKED_EXPERTS = {"gate_up_proj": FUSED["gate_up_proj"], "down_proj": ("down_proj",)}
"""All experts of a layer in one tensor, as transformers holds them: what follows ".experts.", and its parts."""

_FUSED_TENSOR = re.compile(r"^(.*\.)(qkv_proj|gate_and_up_proj)\.(weight|bias|weight_scale|input_scale)$")


class CheckpointError(ValueError):
    """A checkpoint does not hold what its config promises; the message names the tensor or the file."""


def expected_tensors(config: Network) -> dict[str, Shape]:
    """Canonical name → shape of every tensor the network uses. Shapes are `[out, in]`, as torch keeps them."""
    return dict(_tensors(config))


def _tensors(config: Network) -> Iterator[tuple[str, Shape]]:
    hidden = config.hidden_size
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        yield from _attention(config, layer, f"{prefix}self_attn.")
        yield from _feed_forward(config, layer, f"{prefix}mlp.")
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def _attention(config: Network, layer: int, prefix: str) -> Iterator[tuple[str, Shape]]:
    hidden, head_dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    yield from _linear(f"{prefix}q_proj", q_size, hidden, config.attention_bias)
    if not config.is_cross(layer):
        yield from _linear(f"{prefix}k_proj", kv_size, hidden, config.attention_bias)
        yield from _linear(f"{prefix}v_proj", kv_size, hidden, config.attention_bias)
    yield from _linear(f"{prefix}o_proj", hidden, q_size, config.attention_bias)
    if config.use_qk_norm:
        yield f"{prefix}query_layernorm.weight", (head_dim,)
        yield f"{prefix}key_layernorm.weight", (head_dim,)


def _feed_forward(config: Network, layer: int, prefix: str) -> Iterator[tuple[str, Shape]]:
    experts, width = config.experts_at(layer), config.intermediate_at(layer)
    if experts == 1:
        yield from _mlp(config, prefix, width)
        return
    yield f"{prefix}gate.wg.weight", (experts, config.hidden_size)
    if shared := config.shared_width_at(layer):
        yield from _mlp(config, f"{prefix}shared_mlp.", shared)
    for expert in range(experts):
        yield from _mlp(config, f"{prefix}experts.{expert}.", width)


def _mlp(config: Network, prefix: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{prefix}gate_proj", width, config.hidden_size, config.mlp_bias)
    yield from _linear(f"{prefix}up_proj", width, config.hidden_size, config.mlp_bias)
    yield from _linear(f"{prefix}down_proj", config.hidden_size, width, config.mlp_bias)


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def mlp_widths(config: Network) -> set[int]:
    """The widths of all MLPs: dense ones, experts and shared ones."""
    layers = range(config.num_hidden_layers)
    return {width for n in layers for width in (config.intermediate_at(n), config.shared_width_at(n)) if width}


def tensor_parallel_sizes(config: Network) -> list[int]:
    """Sizes that divide the query heads and every MLP's width; KV heads may also be replicated."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    sizes = {heads, *mlp_widths(config)}
    return [
        ranks
        for ranks in range(1, heads + 1)
        if (kv_heads % ranks == 0 or ranks % kv_heads == 0) and all(size % ranks == 0 for size in sizes)
    ]


class Layout:
    """Decides, tensor by tensor, what a checkpoint's tensor is; use one instance a checkpoint.

    Args:
        expected: canonical name → shape of what must be there; default: the tensors of an unquantised checkpoint.
        optional: the same for what may be.
    """

    def __init__(
        self, config: Network, expected: dict[str, Shape] | None = None, optional: dict[str, Shape] | None = None
    ) -> None:
        self.config = config
        self.expected = expected_tensors(config) if expected is None else expected
        self.known = self.expected | (optional or {})
        self._modules = {name.rpartition(".")[0] for name in self.expected}

    def names(self, name: str, shape: Iterable[int]) -> tuple[str, ...]:
        """Canonical names of the tensors that the checkpoint's tensor `name` holds: several if it is fused, none if
        the network has no use for it.

        Raises:
            CheckpointError: `name` is not part of this network, or `shape` does not fit it.
        """
        parts = self.parts(name)
        if not parts:
            return ()
        whole = self.shape(parts)
        if tuple(shape) != whole:
            raise CheckpointError(
                f"checkpoint tensor {name!r} has shape {list(shape)}; this config needs {list(whole)}"
            )
        return parts

    def split(self, name: str, tensor: Any) -> list[tuple[str, Any]]:
        """(canonical name, tensor) pairs of a checkpoint's tensor; anything with `shape`, `reshape` and slicing."""
        parts = self.names(name, tensor.shape)
        if len(parts) < 2:
            return [(part, tensor) for part in parts]
        if ".qkv_proj." in name:
            return list(zip(parts, self._split_qkv(tensor), strict=True))
        heights = [self.known[part][0] for part in parts]
        rows, ends = tensor.reshape(sum(heights), *self.known[parts[0]][1:]), accumulate(heights)
        return [(part, rows[end - height : end]) for part, end, height in zip(parts, ends, heights, strict=True)]

    def types(self, part: str) -> tuple[str, ...]:
        """The types, as safetensors spells them, that the canonical tensor `part` may have."""
        return FLOATS

    def missing(self, seen: Iterable[str]) -> list[str]:
        """Canonical names not in `seen`, in the order of the network."""
        present = set(seen)
        return [name for name in self.expected if name not in present]

    def shape(self, parts: tuple[str, ...]) -> Shape:
        """The shape of the tensor that holds these canonical tensors."""
        first = self.known[parts[0]]
        if len(parts) == 1:
            return first
        rows = sum(self.known[part][0] for part in parts)
        experts = len({part.rsplit(".", 2)[0] for part in parts})
        return (rows, *first[1:]) if experts == 1 else (experts, rows // experts, *first[1:])

    def parts(self, name: str) -> tuple[str, ...]:
        """`names`, whatever the shape."""
        if name in self.known:
            return (name,)
        match = _FUSED_TENSOR.match(name)
        parts = tuple(f"{match[1]}{part}.{match[3]}" for part in FUSED[match[2]]) if match else self._experts(name)
        if all(part in self.known for part in parts):
            return parts
        if self._is_unused(name, parts):
            return ()
        where = "config.json, whose quantization_config has no such scale" if name.endswith("_scale") else "config.json"
        raise CheckpointError(f"checkpoint tensor {name!r} is not part of this network (see {where})")

    def _experts(self, name: str) -> tuple[str, ...]:
        """What a tensor of all experts of a layer holds, expert by expert; any other is itself."""
        module, _, stacked = name.rpartition(".")
        if not module.endswith(".experts") or stacked not in STACKED_EXPERTS:
            return (name,)
        experts = takewhile(lambda expert: f"{module}.{expert}.down_proj.weight" in self.known, count())
        return tuple(f"{module}.{n}.{part}.weight" for n in experts for part in STACKED_EXPERTS[stacked]) or (name,)

    def _is_unused(self, name: str, parts: tuple[str, ...]) -> bool:
        """Rotary buffers, a tied head's copy, and biases beside weights of a network without biases."""
        if ".rotary_emb." in name or name == "lm_head.weight":
            return True
        return name.endswith(".bias") and all(part.removesuffix(".bias") in self._modules for part in parts)

    def _split_qkv(self, tensor: Any) -> tuple[Any, Any, Any]:
        """Rows lie KV head by KV head, each as [its query heads, k, v] × head_dim."""
        kv_heads, head_dim, rest = self.config.num_key_value_heads, self.config.head_dim, tuple(tensor.shape[1:])
        group = self.config.num_attention_heads // kv_heads
        heads = tensor.reshape(kv_heads, group + 2, head_dim, *rest)
        q, k, v = heads[:, :group], heads[:, group], heads[:, group + 1]
        return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)
