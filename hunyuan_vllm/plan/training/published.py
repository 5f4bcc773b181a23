"""What was published of fine-tuning Hunyuan-Large, set against this arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from hunyuan_vllm.plan.models import open_planned
from hunyuan_vllm.plan.published import SHAPE
from hunyuan_vllm.plan.training.choices import COUNTS, fewest
from hunyuan_vllm.plan.training.memory import GIB, TrainingMemory
from hunyuan_vllm.plan.training.setup import Mode, TrainingSetup
from hunyuan_vllm.plan.training.time import iteration

__all__ = ["MINIMA", "SECONDS", "against_published"]

MINIMA: Final[dict[Mode, int]] = {"full": 32, "lora": 8}
"""GPUs that fine-tuning was said to take, all weights with ZeRO-3 and offload."""
SECONDS: Final = 35
"""About so many an iteration at batch 1, of which GPUs and length of sequences were not said."""


def against_published(setup: TrainingSetup) -> list[str]:
    """Sentences for a set-up of the published network; none for another."""
    network = open_planned("hunyuan-large").config
    if any(getattr(network, name) != getattr(setup.config, name) for name in SHAPE):
        return []
    return list(_sentences(setup.changed(stage=3, offload="all")))


def _sentences(setup: TrainingSetup) -> Iterator[str]:
    published = MINIMA[setup.mode]
    what = "all weights (ZeRO-3 and offload)" if setup.mode == "full" else "LoRA"
    there = TrainingMemory(setup.changed(gpus=published))
    found = fewest(setup)
    agrees = "as here"
    if found is None or found.gpus > published:
        agrees = f"here {found.gpus if found else 'more than 1,024'}"
    elif found.gpus < published:
        slow, quick = (iteration(one).one_by_one for one in (found, setup.changed(gpus=published)))
        agrees = f"here {found.gpus} would do, in {slow:,.0f} s an iteration instead of {quick:,.0f}"
    yield (
        f"published: at least {published} GPUs for {what}; {agrees}, with everything offloaded. "
        f"On {published}, a GPU holds {there.gpu_bytes / GIB:,.0f} GiB and a host {there.host_bytes / GIB:,.0f} GiB"
        + (f" of {setup.host / GIB:,.0f}" if setup.host else "")
    )
    fewer = [count for count in COUNTS if count < published and count % setup.per_node == 0]
    if fewer:
        less = TrainingMemory(setup.changed(gpus=fewer[-1]))
        yield f"on {fewer[-1]} a host would hold {less.host_bytes / GIB:,.0f} GiB: hosts set the minimum, not GPUs"
    if not (kept := TrainingMemory(setup.changed(gpus=published, offload="none"))).fits:
        weights = next(item.nbytes for item in kept.gpu if item.name == "weights")
        yield (
            f"without offload {published} are not enough: a GPU would hold {kept.gpu_bytes / GIB:,.0f} GiB, "
            f"{weights / GIB:,.1f} of them weights, and has room for {kept.gpu_room / GIB:,.0f}"
        )
    if setup.mode == "full":
        took = iteration(setup.changed(gpus=published, batch=1))
        near = took.overlapped <= SECONDS <= 1.1 * took.one_by_one
        yield (
            f"published: about {SECONDS} s an iteration at batch 1; here, at {setup.length:,} tokens on {published} "
            f"{setup.gpu.name}, {took.overlapped:,.0f} s if transfers hide behind products and "
            f"{took.one_by_one:,.0f} s if nothing overlaps"
            + (
                ": it is what one gets where little does"
                if near
                else ": these GPUs or this length are not what it was for"
            )
        )
