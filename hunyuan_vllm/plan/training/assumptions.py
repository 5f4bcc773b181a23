"""What the training planner assumes beside what the serving planner does: each with its unit and its reason."""

from __future__ import annotations

from dataclasses import dataclass, field

from hunyuan_vllm.plan.assumptions import Assumptions

__all__ = ["TrainingAssumptions"]


def _assumed(value: float, meaning: str) -> float:
    return field(default=value, metadata={"meaning": meaning})


@dataclass(frozen=True)
class TrainingAssumptions(Assumptions):
    """`--assume name=value` replaces one. None of these numbers was measured on the GPUs that are planned for."""

    logit_bytes: float = _assumed(14, "bytes a logit: bfloat16, float32, log-probabilities, and their gradient")
    fragmentation_efficiency: float = _assumed(0.95, "share of a GPU's memory that PyTorch's allocator can hand out")
    bucket_gib: float = _assumed(0.5, "GiB a GPU: DeepSpeed's buckets for gradients and for parameters to come")
    backward_copies: float = _assumed(2, "gradients of a layer's widest tensors that are alive at once, in copies")
    gathers: float = _assumed(
        2, "times ZeRO-3 gathers all weights in an iteration; once more with checkpointing, whose second forward "
        "pass releases a layer before its backward pass (a layer is larger than stage3_max_reuse_distance)"
    )  # fmt: skip
    pcie_gbs: float = _assumed(25, "GB/s between a GPU and its host, each way")
    host_gbs: float = _assumed(250, "GB/s of a host's memory that the optimizer's step on its CPUs reaches")
    host_used_gib: float = _assumed(60, "GiB a host: Python, CUDA and the data, of all its processes")
