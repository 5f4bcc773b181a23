"""SmoothQuant-style smoothing: input channels with outliers are divided by a factor that the layer before takes on.

Factors are powers of two, so that multiplying and dividing bfloat16 weights by them is exact: the network computes the
same to the bit. (Xiao et al. 2023, arXiv:2211.10438, eq. 4, rounded to a power of two.)
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from hunyuan_vllm.network import Network
from hunyuan_vllm.quantize.calibrate import LayerStats
from hunyuan_vllm.quantize.source import layer_of, place

MOST_POWERS = 10  # a factor is from 2⁻¹⁰ to 2¹⁰, so that no weight leaves bfloat16's range


def factors(inputs: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """What to divide each input channel by, and multiply its weight column by: a power of two near
    max|x|^α / max|w|^(1−α), over all channels 1 in the geometric mean; 1 for a channel without inputs or weights.

    Args:
        inputs: largest magnitude of each input channel, `[in]`.
        columns: largest magnitude of each weight column, `[in]`.
    """
    alive = (inputs > 0) & (columns > 0)
    power = alpha * inputs.log2() - (1 - alpha) * columns.log2()
    power = torch.where(alive, power, 0.0)
    power = torch.where(alive, power - power.sum() / alive.sum().clamp(min=1), 0.0)
    return power.round().clamp(-MOST_POWERS, MOST_POWERS).exp2()


class SmoothQuant:
    """Applies the factors to a checkpoint's tensors, name by name.

    Where the layer before is linear in each channel, it takes them on: a norm for q, k, v; a norm for gate, up, and the
    router that reads the same; up for down (silu(gate) · up is linear in up); an owner's v for the o of all its group.
    """

    def __init__(self, config: Network, alpha: float, stats: Callable[[int], LayerStats]) -> None:
        self._config, self._alpha, self._stats = config, alpha, stats
        self._factors = cache(self._computed)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The canonical tensor `name` after smoothing, in its own dtype."""
        if layer_of(name) is None:
            return tensor
        layer, inner = place(name)
        inner, part = inner.rsplit(".", 1)
        if inner.endswith(("input_layernorm", "post_attention_layernorm", ".v_proj", ".up_proj")):
            shape = (-1, 1) if tensor.dim() == 2 else (-1,)
            tensor = tensor * self._factors(layer, inner).reciprocal().to(tensor.dtype).view(shape)
        if part == "weight" and (factors := self.inputs(layer, inner)) is not None:
            tensor = tensor * factors.to(tensor.dtype)
        return tensor

    def inputs(self, layer: int, projection: str) -> Tensor | None:
        """What the inputs of a layer's linear are divided by, float32 `[in]`; None for other modules."""
        stem, _, kind = projection.rpartition(".")
        if kind in ("q_proj", "k_proj", "v_proj"):
            return self._factors(layer, "input_layernorm")
        if kind == "o_proj":
            kv_heads, head_dim = self._config.num_key_value_heads, self._config.head_dim
            group = self._config.num_attention_heads // kv_heads
            value = self.value(self._config.kv_owner(layer)).view(kv_heads, 1, head_dim)
            return value.expand(-1, group, -1).flatten()
        if kind in ("gate_proj", "up_proj", "wg"):
            return self._factors(layer, "post_attention_layernorm")
        return self._factors(layer, f"{stem}.up_proj") if kind == "down_proj" else None

    def value(self, owner: int) -> Tensor:
        """What an owner's V is divided by, float32 `[kv_heads * head_dim]`."""
        return self._factors(owner, "self_attn.v_proj")

    def _computed(self, layer: int, before: str) -> Tensor:
        """What the outputs of `before`, a norm or linear of the layer, are divided by."""
        stats, config = self._stats(layer), self._config
        if before == "self_attn.v_proj":
            group = [n for n in range(config.num_hidden_layers) if config.kv_owner(n) == layer]
            heads = (config.num_key_value_heads, -1, config.head_dim)
            seen = [self._stats(n) for n in group]
            inputs = [one.inputs["self_attn.o_proj"].view(heads).amax(1).flatten() for one in seen]
            columns = [one.columns["self_attn.o_proj"].view(heads).amax(1).flatten() for one in seen]
        elif before.endswith(".up_proj"):
            down = before.replace("up_proj", "down_proj")
            inputs, columns = [stats.inputs[down]], [stats.columns[down]]
        else:
            ends = ("q_proj", "k_proj", "v_proj") if before == "input_layernorm" else ("gate_proj", "up_proj")
            inputs = [amax for name, amax in stats.inputs.items() if name.endswith(ends)]
            columns = [amax for name, amax in stats.columns.items() if name.endswith(ends)]
        return factors(torch.stack(inputs).amax(0), torch.stack(columns).amax(0), self._alpha)
