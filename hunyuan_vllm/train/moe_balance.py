"""The experts' load: the balance loss, counts, and TensorBoard's curves"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations import TensorBoardCallback

from hunyuan_vllm.config import HunYuanConfig


def moe_layers(config: HunYuanConfig) -> list[int]:
    """The layers that have a router, in the order of a model's `router_logits`."""
    return [layer for layer in range(config.num_hidden_layers) if config.experts_at(layer) > 1]


def balance_loss(router_logits: Sequence[Tensor], topk: Sequence[int], real: Tensor | None = None) -> Tensor:
    """The load-balancing loss of Switch Transformers, mean over layers: 1 if even, up to the number of experts if not.

    Of a layer with E experts: E · Σ f_e · p_e, where f_e is the share of (token, choice) pairs routed to expert e and
    p_e the mean probability of e. Gradients flow through p only. It is computed per batch and process, and averaged.

    Args:
        router_logits: [tokens, experts] of each MoE layer.
        topk: experts a token is given, of each of them.
        real: [tokens], which tokens are not padding; None: all.
    """
    losses = []
    for logits, k in zip(router_logits, topk, strict=True):
        experts = logits.shape[-1]
        probabilities = logits.softmax(-1)
        chosen = F.one_hot(probabilities.topk(k, dim=-1).indices, experts).sum(1).to(logits.dtype)  # [tokens, experts]
        weights = torch.ones_like(logits[:, 0]) if real is None else real.to(logits.device, logits.dtype)
        count = weights.sum()
        given = (chosen * weights[:, None]).sum(0) / (count * k)
        likely = (probabilities * weights[:, None]).sum(0) / count
        losses.append(experts * (given.detach() * likely).sum())
    return torch.stack(losses).mean()


class ExpertLoad:
    """Counts the tokens of each expert of each MoE layer.

    Attributes:
        shares: layer → share of the tokens of each expert, up to the last `take`.
    """

    def __init__(self, config: HunYuanConfig) -> None:
        self.layers = moe_layers(config)
        self.topk = [config.topk_at(layer) for layer in self.layers]
        self._experts = [config.experts_at(layer) for layer in self.layers]
        self._counts: list[Tensor] = []
        self.shares: dict[int, list[float]] = {}

    @torch.no_grad()
    def add(self, router_logits: Sequence[Tensor], real: Tensor | None = None) -> None:
        """Count one batch; the arguments are `balance_loss`'s."""
        new = []
        for logits, k in zip(router_logits, self.topk, strict=True):
            ids = logits.topk(k, dim=-1).indices
            ids = ids if real is None else ids[real.to(ids.device)]
            new.append(ids.flatten().bincount(minlength=logits.shape[-1]))
        self._counts = [a + b for a, b in zip(self._counts, new, strict=True)] if self._counts else new

    def take(self) -> dict[int, list[float]]:
        """Update `shares` from all processes, which must all call this, and reset the counts."""
        self.shares = {}
        if not self._counts:
            return self.shares
        counts, self._counts = torch.cat(self._counts), []
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        parts = counts.double().split(self._experts)
        self.shares = {
            layer: (part / part.sum().clamp(min=1)).tolist() for layer, part in zip(self.layers, parts, strict=True)
        }
        return self.shares


class ExpertBoard(TensorBoardCallback):
    """TensorBoard with the share of each expert, as last taken from `expert_load`."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.logging_dir = folder
        self.expert_load: ExpertLoad | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **others: Any) -> None:
        super().on_log(args, state, control, logs=logs, **others)
        if self.tb_writer is None or self.expert_load is None or "loss" not in (logs or {}):
            return
        for layer, shares in self.expert_load.shares.items():
            for expert, share in enumerate(shares):
                self.tb_writer.add_scalar(f"expert_load/layer_{layer}/expert_{expert}", share, state.global_step)
            self.tb_writer.add_scalar(f"expert_load_max/layer_{layer}", max(shares), state.global_step)
