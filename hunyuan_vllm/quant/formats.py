"""What a checkpoint is stored as, the same for `check`, `plan`, the server and the loader.

A format is loaded by a quantisation of ours or by one of vLLM's own. Neither torch nor vLLM is imported.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from hunyuan_vllm.layout import CheckpointError, Layout, tensor_parallel_sizes
from hunyuan_vllm.network import Network
from hunyuan_vllm.quant.layouts import IgnoredLayers, QuantisedLayout, StoredTensors

PACKED, PLAIN = "pack-quantized", "int-quantized"  # compressed-tensors' int8 formats: weights alone, and W8A8
CONVERT = "convert the unquantised checkpoint with hunyuan-vllm quantize"
GPUS_ONLY = f"vLLM loads it on GPUs only; for a CPU, {CONVERT} --scheme int8"
OLDER_CPU = f"vLLM has 4-bit kernels for CPUs with AVX-512, for experts with AMX; on this one, {CONVERT} --scheme int8"


class UnservedFormat(CheckpointError):
    """A format that cannot be served: what it is in `text`, and what to do in `remedy`."""

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(f"{text}: {remedy}")
        self.text, self.remedy = text, remedy


@dataclass(frozen=True)
class Format:
    """How a checkpoint stores its weights.

    Attributes:
        kind: a short name; None: unquantised.
        scheme: the scheme (`quant.schemes`) that it is stored in; None where it has none.
        ours: a quantisation of this package loads it, not one of vLLM's own.
        stored: how the linear layer of a name is stored.
        ignored: the linear layers that stay unquantised, as the config lists them; None: as the tensors show.
        operands: what its GEMMs are computed in on GPUs that have the units.
        cpus: why a CPU cannot load it, "" if it can.
    """

    kind: str | None = None
    name: str = "unquantised"
    scheme: str | None = "bf16"
    ours: bool = False
    stored: Callable[[str], StoredTensors] | None = None
    ignored: IgnoredLayers | None = IgnoredLayers()
    bits: int = 16
    operands: str = "bf16"
    cpus: str = ""

    @property
    def hardware(self) -> str:
        """What it takes to load it, where that is not any GPU or CPU."""
        int4 = "vLLM loads it on GPUs, and on CPUs with AVX-512; experts need AMX there"
        return int4 if self.scheme == "int4" else self.cpus

    def layout(self, config: Network) -> Layout:
        """Names, shapes and types of the tensors that must be there, and of those that may."""
        if self.stored is None:
            return Layout(config)
        return QuantisedLayout(config, self.stored, self.ignored, cache_scales=not (self.ours and self.scheme != "fp8"))

    def rank_problem(self, config: Network, ranks: int, expert_ranks: int | None = None) -> str | None:
        """Why ranks cannot share this network's weights in this format; None if they can.

        Args:
            ranks: the tensor-parallel size.
            expert_ranks: how many share each expert; default: as many.
        """
        if self.stored is None or self.ours:
            return None
        for name, side, size in _cuts(config, ranks, expert_ranks or ranks):
            if self.ignored is not None and name in self.ignored:
                continue
            stored = self.stored(name)
            shared = (expert_ranks or ranks) if ".experts." in name else ranks
            group = stored.group if shared > 1 and stored.group else 1  # the last of a whole layer may be short
            unit = math.lcm(group if side == "inputs" else stored.block, stored.pack)
            if size % unit:
                return (
                    f"with {shared} ranks each has {size} {side} of {name.rpartition('.')[2]}, and the "
                    f"checkpoint ({self.name}) keeps them in units of {unit} that cannot be split"
                )
        return None

    def check_ranks(self, config: Network, ranks: int, expert_ranks: int | None = None) -> None:
        """Refuse a number of ranks that cuts through what has one scale; see `rank_problem`."""
        if problem := self.rank_problem(config, ranks, expert_ranks):
            sizes = self.rank_sizes(config)
            use = f"use tensor_parallel_size {' or '.join(map(str, sizes))} and pipeline stages" if sizes else CONVERT
            raise UnservedFormat(problem, use)

    def rank_sizes(self, config: Network) -> list[int]:
        """Tensor-parallel sizes that leave whole what has one scale, of those that the network divides over."""
        return [size for size in tensor_parallel_sizes(config) if self.rank_problem(config, size) is None]


def is_scale(name: str) -> bool:
    """Whether a tensor holds scales of a quantised weight, of activations or of a KV cache."""
    return name.endswith(("_scale", "_scale_inv", "_scale_2", ".scales"))


def _cuts(config: Network, ranks: int, expert_ranks: int) -> list[tuple[str, str, int]]:
    """(name, the side that is cut, how long it is on a rank) of one of each kind of linear layer."""
    heads, kv_heads = config.num_attention_heads // ranks, max(1, config.num_key_value_heads // ranks)
    attention = "model.layers.0.self_attn."
    found = [
        (f"{attention}q_proj", "outputs", heads * config.head_dim),
        (f"{attention}k_proj", "outputs", kv_heads * config.head_dim),
        (f"{attention}o_proj", "inputs", heads * config.head_dim),
    ]
    for layer in range(config.num_hidden_layers):
        routed = config.experts_at(layer) > 1
        prefix = f"model.layers.{layer}.mlp." + ("experts.0." if routed else "")
        width = config.intermediate_at(layer) // (expert_ranks if routed else ranks)
        found += [(f"{prefix}up_proj", "outputs", width), (f"{prefix}down_proj", "inputs", width)]
    return found
