"""From scores of single tokens to what a table says of two contestants."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hunyuan_vllm.evaluation.runs import Outcome

__all__ = ["Distance", "distance"]


@dataclass(frozen=True)
class Distance:
    """How far B's predictions are from A's, over all scored tokens.

    Attributes:
        tokens: how many they are.
        perplexity_a, perplexity_b: exp of the mean negative log-likelihood of the text.
        agreement: share of tokens at which both find the same token likeliest.
        kl_mean, kl_median, kl_p99, kl_max: of KL(A‖B) over the whole vocabulary, in nats.
        worst: (passage, token) of the largest KL, both counted from 0; the token as an index into the passage.
    """

    tokens: int
    perplexity_a: float
    perplexity_b: float
    agreement: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    worst: tuple[int, int]

    @property
    def perplexity_ratio(self) -> float:
        """B's perplexity over A's."""
        return self.perplexity_b / self.perplexity_a


def distance(a: Outcome, b: Outcome, scored: list[list[int]]) -> Distance:
    """The distance of B, which was compared with A's record, from A; `scored` are the passages' scored indices."""
    # KL is never negative; rounding of a sum over the vocabulary may say so.
    kl = np.maximum(b.joined("kl"), 0.0)
    where = [(passage, token) for passage, tokens in enumerate(scored) for token in tokens]
    return Distance(
        tokens=len(kl),
        perplexity_a=math.exp(np.mean(a.joined("nll"))),
        perplexity_b=math.exp(np.mean(b.joined("nll"))),
        agreement=float(np.mean(b.joined("same"))),
        kl_mean=float(kl.mean()),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        worst=where[int(kl.argmax())],
    )
