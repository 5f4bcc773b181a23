"""What can be changed about a set-up, with a price: from what costs nothing to what costs other GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hunyuan_vllm.pipeline import legal_partition
from hunyuan_vllm.plan.gpus import Gpu, known_gpus
from hunyuan_vllm.plan.network import Network
from hunyuan_vllm.plan.scenario import Scenario, vllm_limits
from hunyuan_vllm.plan.schemes import SCHEMES

__all__ = ["Change", "arrangements", "gpu_count", "possible_changes", "shorter"]

COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # GPUs that are offered
SCHEME_PRICES = {
    "bf16": "twice the weights",
    "int8": "weights are rounded to int8 while they load",
    "int8-w8a8": "weights and activations are rounded to int8",
    "fp8": "weights and activations are rounded to FP8; needs an FP8 checkpoint",
}


@dataclass(frozen=True)
class Change:
    """A change of some options.

    Attributes:
        values: fields of the scenario and their new values.
        flags: the same as options of `hunyuan-vllm plan`.
        price: what it costs, in words.
        cost: rank of that price; changes are offered cheapest first.
        kind: what it is about. Where a change helps, others of its kind are not offered beside it.
    """

    values: dict[str, Any]
    flags: str
    price: str
    cost: int
    kind: str


def arrangements(network: Network, gpus: int) -> list[tuple[int, int]]:
    """(tensor, pipeline) sizes of one engine on exactly `gpus` GPUs, the most tensor-parallel first."""
    found = [(size, gpus // size) for size in reversed(network.tensor_sizes) if gpus % size == 0]
    return [(tensor, stages) for tensor, stages in found if legal_partition(network.config, stages) is not None]


def possible_changes(scenario: Scenario, any_checkpoint: bool) -> Iterator[Change]:
    """Changes to a scenario, each possible or not: whoever asks judges what comes out.

    Args:
        any_checkpoint: the scheme may be changed; a checkpoint that is quantised already has one.
    """
    yield from _limits(scenario)
    yield from _split(scenario)
    yield from _cache(scenario)
    if any_checkpoint:
        yield from _scheme(scenario)
    if not scenario.eager:
        yield Change({"eager": True}, "--enforce-eager", "no CUDA graphs: slower decoding", 70, "eager")
    yield from _hardware(scenario)


def shorter(length: int) -> Change:
    """Shorter sequences; the length follows from what fits."""
    return Change({"max_model_len": length}, f"--max-model-len {length}", "shorter sequences", 60, "length")


def _limits(scenario: Scenario) -> Iterator[Change]:
    share, price = (0.95, "less memory in reserve") if scenario.utilization < 0.95 else (0.92, "less cache")
    yield Change({"utilization": share}, f"--gpu-memory-utilization {share}", price, 10, "utilization")
    for count in (256, 64):
        if count < scenario.sequences:
            price = f"at most {count} sequences at once"
            yield Change({"sequences": count}, f"--max-num-seqs {count}", price, 20, "sequences")
    if scenario.batched_tokens > 2048 >= scenario.sequences:
        flags = "--max-num-batched-tokens 2048"
        yield Change({"batched_tokens": 2048}, flags, "slower prefill", 20, "tokens")


def _split(scenario: Scenario) -> Iterator[Change]:
    for tensor, stages in arrangements(scenario.network, scenario.gpus):
        if (tensor, stages) != (scenario.tensor, scenario.pipeline):
            yield _engine(scenario, tensor, stages, {}, "", "another split of the same GPUs", 30, "split")


def _engine(
    scenario: Scenario, tensor: int, stages: int, more: dict[str, Any], flags: str, price: str, cost: int, kind: str
) -> Change:
    values = more | {"tensor": tensor, "pipeline": stages, "dcp": 1}
    words = [flags, f"--tp {tensor}"]
    words += [f"--pp {stages}"] if stages > 1 or scenario.pipeline > 1 else []
    words += ["--dcp 1"] if scenario.dcp > 1 else []
    return Change(values, " ".join(word for word in words if word), price, cost, kind)


def _cache(scenario: Scenario) -> Iterator[Change]:
    copies = scenario.tensor // scenario.config.num_key_value_heads
    if copies > 1 and scenario.dcp < copies:
        yield Change({"dcp": copies}, f"--dcp {copies}", "two more collectives a layer", 30, "dcp")
    if scenario.dcp > 1:
        yield Change({"dcp": 1}, "--dcp 1", "each copy of a KV head holds all tokens", 30, "undo dcp")
    if scenario.kv == "auto":
        yield Change({"kv": "fp8"}, "--kv fp8", "cached keys and values are rounded to FP8", 40, "kv")
    else:
        yield Change({"kv": "auto"}, "--kv auto", "twice the bytes a token", 40, "undo kv")
    longest = scenario.config.max_position_embeddings
    if scenario.max_model_len > longest:
        yield shorter(longest)


def _scheme(scenario: Scenario) -> Iterator[Change]:
    for name, scheme in SCHEMES.items():
        if scheme is not scenario.scheme:
            yield Change({"scheme": scheme}, f"--scheme {name}", SCHEME_PRICES[name], 50, f"scheme {name}")


def _hardware(scenario: Scenario) -> Iterator[Change]:
    for gpus in COUNTS:
        for tensor, stages in arrangements(scenario.network, gpus) if gpus > scenario.gpus else ():
            if tensor <= scenario.per_node:
                more = gpus - scenario.gpus
                price, cost = f"{gpu_count(more)} more", 100 + 10 * more
                yield _engine(scenario, tensor, stages, {"gpus": gpus}, f"--gpus {gpus}", price, cost, "gpus")
                break
    for gpu in sorted(known_gpus(), key=lambda gpu: (gpu.memory, -(gpu.bf16_tflops or 0))):
        if gpu.memory > 1.1 * scenario.gpu.memory or gpu.capability > scenario.gpu.capability:
            price = f"GPUs of {gpu.memory_gb:.0f} GB"
            yield Change({"gpu": gpu} | _limits_of(scenario, gpu), f"--gpu {gpu.name}", price, 200, "gpu")


def gpu_count(number: int) -> str:
    """In words."""
    return f"{number} GPU{'' if number == 1 else 's'}"


def _limits_of(scenario: Scenario, gpu: Gpu) -> dict[str, Any]:
    """vLLM's limits for another GPU, where they are its limits for this one."""
    names = ("batched_tokens", "sequences")
    here, there = vllm_limits(scenario.gpu), vllm_limits(gpu)
    return {name: new for name, old, new in zip(names, here, there, strict=True) if getattr(scenario, name) == old}
