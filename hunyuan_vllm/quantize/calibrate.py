"""Calibration: the calibration tokens go through the network layer by layer, and each layer's activations are noted.

Kept between layers, and on the disk so that a killed run goes on there: the hidden states, and the group's K and V.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.quantize.observe import ENOUGH, LayerStats, ObservedLayer
from hunyuan_vllm.quantize.progress import Progress
from hunyuan_vllm.quantize.source import Source
from hunyuan_vllm.quantize.texts import Tokens
from hunyuan_vllm.quantize.workspace import Workspace
from hunyuan_vllm.reference import rotation

__all__ = ["Calibration"]

STATE = "activations"


class Calibration:
    """What calibration learnt of each layer, kept in the workspace."""

    def __init__(self, source: Source, workspace: Workspace) -> None:
        self._source, self._workspace = source, workspace
        # Its group is what migration of a layer's V asks for.
        self.layer = lru_cache(maxsize=source.config.cla_share_factor + 1)(self._layer)

    def run(self, tokens: Tokens, device: str, progress: Progress) -> None:
        """Run the layers that no earlier run has.

        Raises:
            UserError: a weight or an activation is not finite.
        """
        config = self._source.config
        held = self._workspace.tensors(STATE)
        x, k, v, first = self._embedded(tokens) if held is None else _unpacked(held)
        if first == config.num_hidden_layers:
            return
        dtype = x.dtype
        cos, sin = rotation(config, tokens.positions, tokens.ids.shape[1], dtype)
        x, cos, sin, mask = (tensor.to(device) for tensor in (x, cos, sin, tokens.mask))
        k, v = (None if tensor is None else tensor.to(device) for tensor in (k, v))
        with progress.stage("calibrating", config.num_hidden_layers, first, unit="layers"):
            for number in range(first, config.num_hidden_layers):
                layer = ObservedLayer(config, number, lambda name: self._source.read(name).to(dtype), device)
                x, k, v = layer(x, k, v, cos, sin, mask)
                if not x.isfinite().all():
                    raise UserError(f"layer {number} makes NaN or infinite activations of the calibration text")
                self._workspace.write_tensors(f"layer-{number:04d}", layer.stats.to_tensors())
                after = {"x": x.cpu(), "k": k.cpu(), "v": v.cpu(), "next": torch.tensor(number + 1)}
                self._workspace.write_tensors(STATE, after)
                progress.advance(1)

    def idle_experts(self) -> list[dict[str, int]]:
        """Experts that the router sent too few tokens, and so were shown others: layer, expert, tokens routed."""
        return [
            {"layer": number, "expert": int(name.rpartition(".")[2]), "routed": routed}
            for number in range(self._source.config.num_hidden_layers)
            for name, routed in self.layer(number).routed.items()
            if routed < ENOUGH
        ]

    def _embedded(self, tokens: Tokens) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        return self._source.read("model.embed_tokens.weight")[tokens.ids], None, None, 0

    def _layer(self, number: int) -> LayerStats:
        tensors = self._workspace.tensors(f"layer-{number:04d}")
        assert tensors is not None
        return LayerStats.from_tensors(tensors)


def _unpacked(held: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    return held["x"], held["k"], held["v"], int(held["next"])
