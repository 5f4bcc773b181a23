"""A training plan as JSON: the same numbers, in bytes and seconds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hunyuan_vllm.plan.training.choices import choices
from hunyuan_vllm.plan.training.memory import Item, TrainingMemory
from hunyuan_vllm.plan.training.published import against_published
from hunyuan_vllm.plan.training.setup import TrainingSetup
from hunyuan_vllm.plan.training.time import Iteration, iteration

__all__ = ["to_json"]


def to_json(setup: TrainingSetup) -> dict[str, Any]:
    memory = TrainingMemory(setup)
    return {
        "model": setup.name,
        "train": setup.mode,
        "gpu": setup.gpu.name,
        "gpus": setup.gpus,
        "nodes": setup.nodes,
        "zero_stage": setup.stage,
        "offload": setup.offload,
        "tokens_a_gpu": setup.tokens,
        "gradient_checkpointing": setup.checkpointing,
        "fits": memory.fits,
        "parameters": {"total": memory.parameters.total, "trained": memory.parameters.trained},
        "gpu_memory": {"room": memory.gpu_room, "used": memory.gpu_bytes, "items": _items(memory.gpu)},
        "host_memory": {"room": setup.host, "used": memory.host_bytes, "items": _items(memory.host)},
        "iteration": _seconds(iteration(setup)),
        "fewest_gpus": [
            {
                "zero_stage": choice.stage,
                "offload": choice.offload,
                "gpus": choice.setup and choice.setup.gpus,
                "iteration": choice.setup and _seconds(choice.iteration),
            }
            for choice in choices(setup)
        ],
        "published": against_published(setup),
        "assumptions": asdict(setup.assumptions),
    }


def _items(items: list[Item]) -> list[dict[str, Any]]:
    return [{"name": item.name, "bytes": item.nbytes, "exact": item.exact} for item in items]


def _seconds(took: Iteration) -> dict[str, float]:
    low, high = took.tokens_per_second
    parts = {name: getattr(took, name) for name in ("compute", "gather", "reduce", "host", "step")}
    together = {"overlapped": took.overlapped, "one_by_one": took.one_by_one}
    return {**parts, **together, "tokens_per_second_least": low, "tokens_per_second_most": high}
