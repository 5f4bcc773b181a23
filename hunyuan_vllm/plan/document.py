"""A plan as JSON: the same numbers, in bytes, seconds and tokens a second."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hunyuan_vllm.plan.memory import Budget, Capacity
from hunyuan_vllm.plan.plan import Plan
from hunyuan_vllm.plan.scenario import Scenario
from hunyuan_vllm.plan.speed import Decode, Step

__all__ = ["to_json"]


def to_json(plan: Plan) -> dict[str, Any]:
    """Keys are stable; sizes end in _bytes, times in _seconds. What does not apply is absent."""
    verdict = plan.verdict
    document: dict[str, Any] = {
        "fits": verdict.fits,
        "problems": verdict.problems,
        "reasons": verdict.reasons,
        "notes": plan.notes,
        "scenario": _scenario(plan.scenario),
        "stages": [_budget(budget) for budget in verdict.budgets],
    }
    if verdict.budgets:
        document["kv_cache"] = _capacity(verdict.shared)
        document["kv_cache_without_cla"] = _capacity(verdict.unshared)
    if not verdict.fits:
        document["remedies"] = [
            {
                "flags": remedy.flags,
                "price": remedy.price,
                "tokens": remedy.verdict.shared.tokens,
                "max_model_len": remedy.verdict.scenario.max_model_len,
            }
            for remedy in plan.remedies
        ]
        return document
    return document | {
        "command": plan.command,
        "concurrency": [asdict(point) for point in plan.concurrency],
        "decode": [_decode(rate.decode) | {"served_tokens_per_second": rate.served} for rate in plan.rates],
        "prefill": {
            "bound_tokens_per_second": plan.prefill.bound,
            "estimate_tokens_per_second": plan.prefill.estimate,
            "first_token_seconds": plan.prefill.first_token,
            "step": _step(plan.prefill.step),
        },
        "published": [asdict(rate) | {"share_of_bound": rate.share} for rate in plan.published],
        "improvements": [
            {
                "flags": better.remedy.flags,
                "price": better.remedy.price,
                "tokens_ratio": better.tokens,
                "rate_ratio": better.rate,
            }
            for better in plan.improvements
        ],
    }


def _scenario(scenario: Scenario) -> dict[str, Any]:
    return {
        "model": scenario.name,
        "gpu": scenario.gpu.model_dump(mode="json", exclude={"aliases"}),
        "gpus": scenario.gpus,
        "replicas": scenario.replicas,
        "tensor_parallel_size": scenario.tensor,
        "pipeline_parallel_size": scenario.pipeline,
        "layer_partition": scenario.partition,
        "decode_context_parallel_size": scenario.dcp,
        "scheme": scenario.scheme.name,
        "kv_cache_dtype": scenario.kv,
        "max_model_len": scenario.max_model_len,
        "gpu_memory_utilization": scenario.utilization,
        "max_num_batched_tokens": scenario.batched_tokens,
        "max_num_seqs": scenario.sequences,
        "block_size": scenario.block_size,
        "enforce_eager": scenario.eager,
        "input_len": scenario.input_len,
        "output_len": scenario.output_len,
        "gpus_per_node": scenario.per_node,
        "node_link_bytes_per_second": scenario.node_link,
        "assumptions": asdict(scenario.assumptions),
    }


def _budget(budget: Budget) -> dict[str, Any]:
    """Of one GPU of a pipeline stage."""
    return {
        "layers": [budget.stage.layers.start, budget.stage.layers.stop],
        "total_bytes": budget.total,
        "vllm_share_bytes": budget.taken,
        "weight_bytes": budget.weights.total,
        "weight_parameter_bytes": budget.weights.parameters,
        "weight_buffer_bytes": budget.weights.buffers,
        "weight_padding_bytes": budget.weights.padding,
        "weight_parts_bytes": budget.weights.parts,
        "activation_bytes": budget.activations,
        "cuda_graph_bytes": budget.graphs,
        "workspace_bytes": budget.workspace,
        "kv_cache_bytes": budget.cache,
        "outside_bytes": budget.outside,
    }


def _capacity(capacity: Capacity) -> dict[str, int]:
    return {
        "blocks": capacity.blocks,
        "block_tokens": capacity.block_size,
        "tokens": capacity.tokens,
        "bytes_per_token_on_a_rank": capacity.bytes_per_token,
    }


def _decode(decode: Decode) -> dict[str, Any]:
    return {
        "batch": decode.batch,
        "bound_tokens_per_second": decode.bound,
        "estimate_tokens_per_second": decode.estimate,
        "estimate_low_tokens_per_second": decode.low,
        "per_sequence_tokens_per_second": decode.per_sequence,
        "limited_by": decode.step.limited_by,
        "step": _step(decode.step),
    }


def _step(step: Step) -> dict[str, float]:
    """Of one GPU."""
    return {
        "tokens": step.tokens,
        "distinct_experts": step.experts,
        "weight_bytes": step.weight_bytes,
        "cache_bytes": step.cache_bytes,
        "operations": step.operations,
        "all_reduce_bytes": step.reduced_bytes,
        "memory_seconds": step.memory,
        "compute_seconds": step.compute,
        "collective_seconds": step.collectives,
        "overhead_seconds": step.overhead,
        "estimate_seconds": step.estimate,
    }
