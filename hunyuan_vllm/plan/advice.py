"""Changes that make a set-up fit, cheapest first"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from typing import Any

from hunyuan_vllm.kv_cache import legal_partition
from hunyuan_vllm.layout import tensor_parallel_sizes
from hunyuan_vllm.network import Network
from hunyuan_vllm.plan.fit import Fit, check_fit
from hunyuan_vllm.plan.hardware import known_gpus
from hunyuan_vllm.plan.scenario import Scenario, vllm_limits
from hunyuan_vllm.plan.schemes import SCHEMES
from hunyuan_vllm.util.text import plural

COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # GPUs that are offered
SCHEME_PRICES = {  # of the schemes that any checkpoint can be brought into
    "bf16": "twice the weights",
    "int8": "weights are rounded to int8 while they load",
    "int8-w8a8": "weights and activations are rounded to int8",
    "fp8": "weights and activations are rounded to FP8; needs an FP8 checkpoint",
}


OPTIONS = {  # of `hunyuan-vllm plan`, by the scenario's fields
    "gpu": "--gpu", "gpus": "--gpus", "tensor": "--tp", "pipeline": "--pp", "dcp": "--dcp", "scheme": "--scheme",
    "kv": "--kv", "max_model_len": "--max-model-len", "utilization": "--gpu-memory-utilization",
    "sequences": "--max-num-seqs", "batched_tokens": "--max-num-batched-tokens",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Change:
    """A change of some options.

    Attributes:
        values: fields of the scenario and their new values.
        cost: its rank; the cheapest changes come first.
        kind: its subject. Where a change suffices, others of its kind are not offered beside it.
    """

    values: dict[str, Any]
    price: str
    cost: int
    kind: str

    def flags(self, scenario: Scenario) -> str:
        """As options of `hunyuan-vllm plan` beside those that the scenario was made from."""
        words = ["--enforce-eager"] if "eager" in self.values else []
        for name, option in OPTIONS.items():
            if name not in self.values or ("gpu" in self.values and name != "gpu"):  # limits follow from the GPU
                continue
            value = self.values[name]
            if name == "tensor" or value != getattr(scenario, name):  # without --tp all GPUs of a stage share a layer
                words.append(f"{option} {getattr(value, 'name', value)}")
        return " ".join(words)


def arrangements(config: Network, gpus: int) -> list[tuple[int, int]]:
    """(tensor, pipeline) sizes of one engine on exactly `gpus` GPUs, the most tensor-parallel first."""
    found = [(size, gpus // size) for size in reversed(tensor_parallel_sizes(config)) if gpus % size == 0]
    return [(tensor, stages) for tensor, stages in found if legal_partition(config, stages) is not None]


def possible_changes(scenario: Scenario) -> Iterator[Change]:
    share, price = (0.95, "less memory in reserve") if scenario.utilization < 0.95 else (0.92, "less cache")
    yield Change({"utilization": share}, price, 10, "utilization")
    for count in (256, 64):
        if count < scenario.sequences:
            yield Change({"sequences": count}, f"at most {count} sequences at once", 20, "sequences")
    if scenario.batched_tokens > 2048 >= scenario.sequences:
        yield Change({"batched_tokens": 2048}, "slower prefill", 20, "tokens")
    for split in arrangements(scenario.config, scenario.gpus):
        if split != (scenario.tensor, scenario.pipeline):
            yield Change(_split(*split), "another split of the same GPUs", 30, "split")
    copies = scenario.tensor // scenario.config.num_key_value_heads
    if copies > 1 and scenario.dcp < copies:
        yield Change({"dcp": copies}, "two more collectives a layer", 30, "dcp")
    if scenario.dcp > 1:
        yield Change({"dcp": 1}, "each copy of a KV head holds all tokens", 30, "undo dcp")
    if scenario.kv == "auto":
        yield Change({"kv": "fp8"}, "cached keys and values are rounded to FP8", 40, "kv")
    else:
        yield Change({"kv": "auto"}, "twice the bytes a token", 40, "undo kv")
    if scenario.max_model_len > scenario.config.longest_context:
        yield shorter(scenario.config.longest_context)
    for name, price in SCHEME_PRICES.items():
        if not scenario.quantised and SCHEMES[name] is not scenario.scheme:
            yield Change({"scheme": SCHEMES[name]}, price, 50, f"scheme {name}")
    if not scenario.eager:
        yield Change({"eager": True}, "no CUDA graphs: slower decoding", 70, "eager")
    for gpus in (count for count in COUNTS if count > scenario.gpus):
        within = (split for split in arrangements(scenario.config, gpus) if split[0] <= scenario.per_node)
        if found := next(within, None):
            more = gpus - scenario.gpus
            yield Change({"gpus": gpus} | _split(*found), plural(more, "more GPU"), 100 + 10 * more, "gpus")
    default_tokens, default_sequences = vllm_limits(scenario.gpu)
    for gpu in sorted(known_gpus(), key=lambda gpu: (gpu.memory, -(gpu.bf16_tflops or 0))):
        if gpu.memory > 1.1 * scenario.gpu.memory or gpu.capability > scenario.gpu.capability:
            tokens, sequences = vllm_limits(gpu)
            values: dict[str, Any] = {"gpu": gpu}
            values |= {"batched_tokens": tokens} if scenario.batched_tokens == default_tokens else {}
            values |= {"sequences": sequences} if scenario.sequences == default_sequences else {}
            yield Change(values, f"GPUs of {gpu.memory_gb:.0f} GB", 200, "gpu")


def _split(tensor: int, stages: int) -> dict[str, int]:
    return {"tensor": tensor, "pipeline": stages, "dcp": 1}


def shorter(length: int) -> Change:
    return Change({"max_model_len": length}, "shorter sequences", SHORTER_COST, "length")


LENGTH_STEP, MIN_LENGTH, SHORTER_COST = 1024, 4096, 60


@dataclass(frozen=True)
class Remedy:
    """Some changes, as flags too, and the fit of the changed scenario."""

    changes: tuple[Change, ...]
    flags: str
    fit: Fit

    @classmethod
    def of(cls, scenario: Scenario, *changes: Change) -> "Remedy":
        changed = scenario
        for change in changes:
            changed = changed.changed(**change.values)
        return cls(changes, " ".join(change.flags(scenario) for change in changes), check_fit(changed))

    @property
    def price(self) -> str:
        return "; ".join(change.price for change in self.changes)

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(change.kind for change in self.changes)


def remedies(fit: Fit, limit: int = 6) -> list[Remedy]:
    """Up to `limit` ways to make it fit, cheapest first: one or two changes, or these with shorter sequences. Where
    some changes suffice, no others are added to them."""
    changes = list(possible_changes(fit.scenario))
    groups = [(), *((change,) for change in changes), *combinations(changes, 2)]
    priced = [
        (sum(change.cost for change in group) + SHORTER_COST * cut, cut, group)
        for group in groups
        for cut in (False, True)
    ]
    made = cache(partial(Remedy.of, fit.scenario))
    found: list[Remedy] = []
    for _, cut, group in sorted(priced, key=lambda candidate: candidate[:2]):
        kinds = {change.kind for change in group} | ({"length"} if cut else set())
        overlap = len(group) == 2 and group[0].values.keys() & group[1].values.keys()
        if overlap or any(remedy.kinds <= kinds for remedy in found):
            continue
        remedy = made(*group)
        if cut:  # sequences as long as the cache then holds, in whole thousands
            changed, length = remedy.fit.scenario, remedy.fit.shared.tokens // LENGTH_STEP * LENGTH_STEP
            shortest = max(MIN_LENGTH, changed.input_len + changed.output_len)
            if remedy.fit.problems or not shortest <= length < changed.max_model_len:
                continue
            remedy = Remedy.of(fit.scenario, *group, shorter(length))
        if remedy.fit.fits:
            found.append(remedy)
        if len(found) == limit:
            break
    return found
