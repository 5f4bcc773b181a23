"""Where a decode step's time goes: every profiled event's own time, added up by what it is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from processes import Engine

__all__ = ["Part", "ProfiledEngine"]

LINEARS, EXPERTS, ATTENTION = "linears", "experts", "attention"
GLUE = "norms, RoPE, activations, routing: the compiled graph and what it calls"
ENGINE = "engine and scheduler"
# By name, most telling first: an event that matches none counts to the event it runs in.
KERNELS = {
    "_C::weight_packed_linear": LINEARS,
    "_C::onednn_": LINEARS,
    "aten::mm": LINEARS,
    "aten::addmm": LINEARS,
    "mkldnn_linear": LINEARS,
    "_C::fused_experts_cpu": EXPERTS,
    "_C::cpu_fused_moe": EXPERTS,
    "_C::cpu_attention": ATTENTION,
    "_C::cpu_attn_reshape_and_cache": ATTENTION,
    "vllm::unified_attention": ATTENTION,
    "vllm::unified_kv_cache_update": ATTENTION,
    "gpu_model_runner: forward": GLUE,
    "gpu_model_runner: preprocess": "inputs and attention metadata",
    "gpu_model_runner: postprocess": "logits, without the head's product",
    "gpu_model_runner: sample": "sampling",
    "gpu_model_runner: bookkeep": "sampling",
}
# vLLM names its spans only when asked to.
ENVIRON = {"VLLM_CUSTOM_SCOPES_FOR_PROFILING": "1"}


@dataclass(frozen=True)
class Part:
    """One line of the breakdown."""

    name: str
    milliseconds: float
    """A step."""
    calls: float
    """Events a step."""


class ProfiledEngine(Engine):
    """An engine that also breaks its decode steps down. Build it with `ENVIRON`."""

    def breakdown(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Part]:
        """Parts of a decode step, the largest first."""
        from torch.profiler import ProfilerActivity, profile

        stepping = self.stepping(prompts, new_tokens)
        next(stepping)  # reads the prompts
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            steps = sum(1 for _ in stepping)
        seconds: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for event in profiler.events():
            name = _part(event)
            seconds[name] += event.self_cpu_time_total / 1e6
            calls[name] += 1
        return [Part(name, 1e3 * total / steps, calls[name] / steps) for name, total in seconds.most_common()]


def _part(event: Any) -> str:
    while event is not None:
        for start, part in KERNELS.items():
            if event.name.startswith(start):
                return part
        event = event.cpu_parent
    return ENGINE
