"""Which linears a quantised checkpoint leaves as they were. No vLLM is imported."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError, Shape, expected_tensors
from hunyuan_vllm.quant.scheme import is_quantised

__all__ = ["IgnoredLayers", "product_of", "quantised_linears"]

_FUSED_NAMES = {  # the last is vLLM's own spelling
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
    **dict.fromkeys(("gate_proj", "up_proj"), ("gate_and_up_proj", "gate_up_proj")),
}


class IgnoredLayers:
    """The linears that a checkpoint leaves unquantised, as its config lists them.

    An entry is one or more whole components of a linear's name ("model.layers.3", "mlp.shared_mlp", "o_proj"), in which
    a fused projection may stand for its parts; or it is "re:" and a pattern for the start of the name.
    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self.entries = entries = list(entries)
        self.names = [f".{entry}." for entry in entries if not entry.startswith("re:")]
        self.patterns = [re.compile(entry.removeprefix("re:")) for entry in entries if entry.startswith("re:")]

    def __contains__(self, linear: str) -> bool:
        spellings = [f".{spelling}." for spelling in _spellings(linear)]
        return any(name in spelling for name in self.names for spelling in spellings) or any(
            pattern.match(spelling[1:-1]) for pattern in self.patterns for spelling in spellings
        )

    def covers(self, module: str) -> bool:
        """Whether a linear of the engine, or its experts of a layer, are among them; one part stands for all that is
        fused, because `quantised_linears` refuses checkpoints that ignore a part."""
        parent, _, name = module.rpartition(".")
        first = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj", "experts": "experts.0.gate_proj"}.get(name, name)
        return f"{parent}.{first}" in self


def quantised_linears(config: HunYuanConfig, ignored: IgnoredLayers) -> dict[str, Shape]:
    """Canonical name and weight's shape of the linears that are quantised.

    Raises:
        CheckpointError: only a part of what the engine computes in one product is ignored.
    """
    shapes = {
        name.removesuffix(".weight"): shape for name, shape in expected_tensors(config).items() if is_quantised(name)
    }
    products: dict[str, list[str]] = defaultdict(list)
    for linear in shapes:
        products[product_of(linear)].append(linear)
    for linears in products.values():
        _refuse_partly_ignored(linears, ignored)
    return {linear: shape for linear, shape in shapes.items() if linear not in ignored}


def _spellings(linear: str) -> list[str]:
    """A linear's name, and those of the fused projections it may be part of."""
    module, _, projection = linear.rpartition(".")
    return [linear, *(f"{module}.{name}" for name in _FUSED_NAMES.get(projection, ()))]


def product_of(linear: str) -> str:
    """What the engine computes this linear with: its fused projection, all experts of its layer, or itself."""
    module, _, projection = linear.rpartition(".")
    if ".experts." in module:
        return module.rpartition(".")[0]
    return f"{module}.{_FUSED_NAMES.get(projection, (projection,))[0]}"


def _refuse_partly_ignored(linears: list[str], ignored: IgnoredLayers) -> None:
    left = [linear for linear in linears if linear in ignored]
    if left and len(left) < len(linears):
        other = next(linear for linear in linears if linear not in ignored)
        raise CheckpointError(
            f"quantization_config leaves {left[0]!r} unquantised and not {other!r}, which are computed in one product: "
            "it must name both or neither"
        )
