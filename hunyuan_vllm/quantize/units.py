"""The checkpoint cut into units: tensors that are read together, because the engine fuses them under one scale."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import expected_tensors
from hunyuan_vllm.quant.layouts import is_quantised

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


# The first projection of a fused one → all of it.
_FUSED = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Unit:
    """Canonical names of the tensors that are converted together: all weights of one fused projection, or one tensor
    that stays as it is."""

    names: tuple[str, ...]
    quantised: bool

    @property
    def layer(self) -> int | None:
        """Decoder layer; None for embedding, final norm and head."""
        return layer_of(self.names[0])


def units(config: HunYuanConfig) -> Iterator[Unit]:
    """Every tensor of the network, in its order, each in one unit."""
    expected = expected_tensors(config)
    done: set[str] = set()
    for name in expected:
        if name in done:
            continue
        if not is_quantised(name):
            yield Unit((name,), quantised=False)
            continue
        stem, projection = name.removesuffix(".weight").rsplit(".", 1)
        fused = tuple(f"{stem}.{part}.weight" for part in _FUSED.get(projection, (projection,)))
        names = tuple(part for part in fused if part in expected)
        done.update(names)
        yield Unit(names, quantised=True)


def layer_of(name: str) -> int | None:
    """The decoder layer a canonical name belongs to."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def place(name: str) -> tuple[int, str]:
    """Layer of a canonical name of a decoder layer, and its name within that layer."""
    match = _LAYER.match(name)
    assert match is not None, name
    return int(match[1]), name[match.end() :]


def input_of(weight: str) -> str:
    """What the inputs of a weight's projection are known by: the projection whose inputs they are, without layer, and
    one name for all experts of a layer, which the engine runs under one input scale.

    `self_attn.q_proj`, `self_attn.o_proj`, `mlp.experts.gate_proj`, `mlp.shared_mlp.down_proj`, …
    """
    name = _LAYER.sub("", weight).removesuffix(".weight")
    name = re.sub(r"\.experts\.\d+\.", ".experts.", name)
    name = re.sub(r"\.[kv]_proj$", ".q_proj", name)
    return name.replace(".up_proj", ".gate_proj")


def kept_linears(config: HunYuanConfig) -> list[str]:
    """The linear layers that are not quantised: the head, and each router."""
    routers = [name.removesuffix(".weight") for name in expected_tensors(config) if name.endswith(".gate.wg.weight")]
    return ["lm_head", *routers]
