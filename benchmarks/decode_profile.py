"""The profile of a decode step: every profiled event's own time, summed by purpose."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import Report, Spread, interleaved, note, ratios
from probe import Probe, Weights
from processes import Child, Engine, engine_environ, random_prompts

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
    **{f"hunyuan_vllm::{scheme}_linear": LINEARS for scheme in ("bf16", "w8a16", "w8a8")},
    **{f"hunyuan_vllm::{scheme}_experts": EXPERTS for scheme in ("bf16", "w8a16", "w8a8")},
    "hunyuan_vllm::bf16_mlp": LINEARS,
    "_C::int8_scaled_mm": LINEARS,
    "hunyuan_vllm::w8a8_amx_experts": EXPERTS,
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


class ProfiledEngine(Engine):
    """An engine that also breaks its decode steps down. Build it with `ENVIRON`."""

    def breakdown(self, prompts: Sequence[list[int]], new_tokens: int) -> dict[str, float]:
        """Milliseconds of a decode step by part."""
        from torch import profiler

        stepping = self.stepping(prompts, new_tokens)
        next(stepping)  # reads the prompts
        with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as recorded:
            steps = sum(1 for _ in stepping)
        milliseconds: Counter[str] = Counter()
        for event in recorded.events():
            milliseconds[_part(event)] += event.self_cpu_time_total / 1e3 / steps
        return dict(milliseconds)


def _part(event: Any) -> str:
    while event is not None:
        for start, part in KERNELS.items():
            if event.name.startswith(start):
                return part
        event = event.cpu_parent
    return ENGINE


def profile(
    model: Path, settings: dict[str, Any], batches: Sequence[int], arguments: argparse.Namespace, report: Report
) -> None:
    """Add a table for each batch size to the report; `settings` are the engine's."""
    config = json.loads((model / "config.json").read_text())
    vocab_size, topk = config["vocab_size"], config.get("moe_topk", 0)
    topk = topk[0] if isinstance(topk, list) else topk
    environ = engine_environ(arguments.threads)
    with (
        Child("compiled", ProfiledEngine, model, settings, environ=environ | ENVIRON) as engine,
        Child("probe", Probe, environ=environ) as probe,
    ):
        engine.ready()
        probe.ready()
        for batch in batches:
            note(f"profiling batch {batch}")
            work = (random_prompts(vocab_size, [arguments.prompt_tokens] * batch, batch), arguments.new_tokens)
            turns: dict[str, Callable[[], Any]] = {
                "probe": partial(probe.call, "read"),
                "plain": partial(engine.call, "steps", *work),
                "profiled": partial(engine.call, "breakdown", *work),
            }
            turns["plain"]()
            weights = Weights.of(model, projections=1 if settings.get("quantization") else 2)
            _tabulate(report, batch, weights, topk, **interleaved(turns, arguments.rounds, notes=False))


def _tabulate(
    report: Report,
    batch: int,
    weights: Weights,
    topk: int,
    probe: list[dict[str, float]],
    plain: list[tuple[list[float], Any]],
    profiled: list[dict[str, float]],
) -> None:
    """By round: bytes a second, seconds of each step and its tokens, milliseconds of a step by part."""
    title = f"A decode step at batch {batch}"
    read = {LINEARS: weights.always} | ({EXPERTS: topk * weights.expert} if batch == 1 else {})
    totals = [sum(parts.values()) for parts in profiled]
    for part in sorted(profiled[0], key=profiled[0].__getitem__, reverse=True):
        times = [parts[part] for parts in profiled]
        speed = Spread.of(read[part] / time / 1e6 for time in times) if part in read else ""
        report.add(title, part=part, ms=Spread.of(times), share=ratios(times, totals), GB_a_second=speed)
    report.add(title, part="all", ms=Spread.of(totals), share="", GB_a_second="")
    means = Spread.of(1e3 * sum(seconds[1:]) / (len(seconds) - 1) for seconds, _ in plain)
    report.add(title, part="all, without the profiler", ms=means, share="", GB_a_second="")
    best = Spread.of(max(ways.values()) / 1e9 for ways in probe)
    report.add(title, part="this machine, reading at its best", ms="", share="", GB_a_second=best)
