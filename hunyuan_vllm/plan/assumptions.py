"""What the planner assumes where nothing was measured: each with its unit, its reason, and a way to change it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from math import isfinite
from typing import Self

from hunyuan_vllm.errors import UserError

__all__ = ["Assumptions", "explain"]


def _assumed(value: float, meaning: str) -> float:
    return field(default=value, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Assumptions:
    """`--assume name=value` replaces one. None of these numbers was measured on the GPUs that are planned for."""

    context_gib: float = _assumed(0.6, "GiB a GPU: CUDA context and loaded kernels, outside vLLM's share")
    nccl_gib: float = _assumed(0.8, "GiB a GPU: NCCL's and the custom all-reduce's buffers, outside vLLM's share")
    nccl_network_gib: float = _assumed(0.8, "GiB a GPU more of them where ranks are on several nodes")
    workspace_gib: float = _assumed(0.6, "GiB a GPU: cuBLAS and attention workspaces, allocator rounding")
    graph_layer_kib: float = _assumed(64, "KiB a layer and captured CUDA graph, beside the largest graph's activations")
    logit_bytes: float = _assumed(14, "bytes a logit while sampling: bfloat16, float32, probabilities, noise")
    memory_efficiency: float = _assumed(0.75, "share of the memory bandwidth that a step's reads reach")
    compute_efficiency: float = _assumed(0.60, "share of the peak rate that large products reach")
    link_efficiency: float = _assumed(0.70, "share of a link's bandwidth that an all-reduce reaches")
    layer_overhead_us: float = _assumed(30, "µs a layer that small kernels add, CUDA graphs on")
    eager_layer_overhead_us: float = _assumed(300, "the same with --enforce-eager: the host launches each kernel")
    step_overhead_ms: float = _assumed(2, "ms a step: scheduler, inputs, sampling, output")
    all_reduce_us: float = _assumed(10, "µs an all-reduce takes however little it carries, within a node")
    network_us: float = _assumed(25, "µs more where it crosses nodes")

    def changed(self, settings: Iterable[str]) -> Self:
        """With each "name=value" of `settings` replaced.

        Raises:
            UserError: a name is not an assumption, or a value no number it could have.
        """
        known = {entry.name for entry in fields(self)}
        values: dict[str, float] = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            if name not in known:
                near = get_close_matches(name, known, 1)
                meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
                raise UserError(f"--assume {setting}: {name} is no assumption: {meant}")
            values[name] = _number(setting, name, text)
        return replace(self, **values)


def _number(setting: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"--assume {setting}: give a number, as in --assume {name}=0.5") from None
    is_share = name.endswith("efficiency")
    if not isfinite(value) or value < 0 or (is_share and not 0 < value <= 1):
        raise UserError(f"--assume {setting}: {'above 0 and at most 1' if is_share else 'at least 0'} is possible")
    return value


def explain(assumptions: Assumptions) -> list[tuple[str, float, str]]:
    """(name, value, meaning) of each."""
    return [(entry.name, getattr(assumptions, entry.name), entry.metadata["meaning"]) for entry in fields(assumptions)]
