"""The experts' load: the balance loss, and counts"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hunyuan_vllm.config import HunYuanConfig


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
        topk: experts a token is given, of each layer that has a router, in the order of a model's `router_logits`.
    """

    def __init__(self, config: HunYuanConfig) -> None:
        layers = [layer for layer in range(config.num_hidden_layers) if config.experts_at(layer) > 1]
        self.topk = [config.topk_at(layer) for layer in layers]
        self._counts: list[Tensor] = []

    @torch.no_grad()
    def add(self, router_logits: Sequence[Tensor], real: Tensor | None = None) -> None:
        """Count one batch; the arguments are `balance_loss`'s."""
        new = []
        for logits, k in zip(router_logits, self.topk, strict=True):
            ids = logits.topk(k, dim=-1).indices
            ids = ids if real is None else ids[real.to(ids.device)]
            new.append(ids.flatten().bincount(minlength=logits.shape[-1]))
        self._counts = [a + b for a, b in zip(self._counts, new, strict=True)] if self._counts else new

    def take_max(self) -> float | None:
        """The largest share of a layer's tokens that one expert was given, over all processes, which must all call
        this; None without counts. Starts anew."""
        if not self._counts:
            return None
        counts = torch.cat(self._counts)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        layers = counts.double().split([len(layer) for layer in self._counts])
        self._counts = []
        return max(float(layer.max() / layer.sum().clamp(min=1)) for layer in layers)
