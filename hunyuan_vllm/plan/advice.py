"""Changes that make a set-up fit, cheapest first, and changes that improve one that fits"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

from hunyuan_vllm.kv_cache import legal_partition
from hunyuan_vllm.plan.fit import Fit, check_fit
from hunyuan_vllm.plan.hardware import Gpu, known_gpus
from hunyuan_vllm.plan.model import Network
from hunyuan_vllm.plan.scenario import Scenario, vllm_limits
from hunyuan_vllm.plan.schemes import SCHEMES
from hunyuan_vllm.plan.speed import decode
from hunyuan_vllm.util.text import plural

COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # GPUs that are offered
SCHEME_PRICES = {  # of the schemes that any checkpoint can be brought into
    "bf16": "twice the weights",
    "int8": "weights are rounded to int8 while they load",
    "int8-w8a8": "weights and activations are rounded to int8",
    "fp8": "weights and activations are rounded to FP8; needs an FP8 checkpoint",
}


@dataclass(frozen=True, eq=False)
class Change:
    """A change of some options.

    Attributes:
        values: fields of the scenario and their new values.
        flags: the same as options of `hunyuan-vllm plan`.
        cost: its rank; the cheapest changes come first.
        kind: its subject. Where a change suffices, others of its kind are not offered beside it.
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


def possible_changes(scenario: Scenario) -> Iterator[Change]:
    yield from _limits(scenario)
    yield from _split(scenario)
    yield from _cache(scenario)
    if not scenario.quantised:
        yield from _scheme(scenario)
    if not scenario.eager:
        yield Change({"eager": True}, "--enforce-eager", "no CUDA graphs: slower decoding", 70, "eager")
    yield from _hardware(scenario)


def shorter(length: int) -> Change:
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
    longest = scenario.config.longest_context
    if scenario.max_model_len > longest:
        yield shorter(longest)


def _scheme(scenario: Scenario) -> Iterator[Change]:
    for name, price in SCHEME_PRICES.items():
        if SCHEMES[name] is not scenario.scheme:
            yield Change({"scheme": SCHEMES[name]}, f"--scheme {name}", price, 50, f"scheme {name}")


def _hardware(scenario: Scenario) -> Iterator[Change]:
    for gpus in COUNTS:
        for tensor, stages in arrangements(scenario.network, gpus) if gpus > scenario.gpus else ():
            if tensor <= scenario.per_node:
                more = gpus - scenario.gpus
                price, cost = plural(more, "more GPU"), 100 + 10 * more
                yield _engine(scenario, tensor, stages, {"gpus": gpus}, f"--gpus {gpus}", price, cost, "gpus")
                break
    for gpu in sorted(known_gpus(), key=lambda gpu: (gpu.memory, -(gpu.bf16_tflops or 0))):
        if gpu.memory > 1.1 * scenario.gpu.memory or gpu.capability > scenario.gpu.capability:
            price = f"GPUs of {gpu.memory_gb:.0f} GB"
            yield Change({"gpu": gpu} | _limits_of(scenario, gpu), f"--gpu {gpu.name}", price, 200, "gpu")


def _limits_of(scenario: Scenario, gpu: Gpu) -> dict[str, Any]:
    """vLLM's default limits for another GPU, where this scenario has the defaults of its own."""
    names = ("batched_tokens", "sequences")
    here, there = vllm_limits(scenario.gpu), vllm_limits(gpu)
    return {name: new for name, old, new in zip(names, here, there, strict=True) if getattr(scenario, name) == old}


LENGTH_STEP, MIN_LENGTH = 1024, 4096
SHORTER_COST = shorter(MIN_LENGTH).cost


@dataclass(frozen=True)
class Remedy:
    """Some changes, and the fit of the changed scenario."""

    changes: tuple[Change, ...]
    fit: Fit

    @classmethod
    def of(cls, scenario: Scenario, *changes: Change) -> "Remedy":
        for change in changes:
            scenario = scenario.changed(**change.values)
        return cls(changes, check_fit(scenario))

    @property
    def flags(self) -> str:
        return " ".join(change.flags for change in self.changes)

    @property
    def price(self) -> str:
        return "; ".join(change.price for change in self.changes)

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(change.kind for change in self.changes)


def remedies(fit: Fit, limit: int = 6) -> list[Remedy]:
    """Up to `limit` ways to make it fit, of one or two changes. Where a change suffices, it is not combined."""
    changes = list(possible_changes(fit.scenario))
    pairs = (pair for pair in combinations(changes, 2) if not pair[0].values.keys() & pair[1].values.keys())
    groups: list[tuple[Change, ...]] = list(chain([()], ((change,) for change in changes), pairs))
    candidates = [
        (sum(change.cost for change in group) + SHORTER_COST * cut, cut, group)
        for group in groups
        for cut in (False, True)
    ]
    known: dict[tuple[Change, ...], Remedy] = {}
    found: list[Remedy] = []
    for _, cut, group in sorted(candidates, key=lambda candidate: candidate[:2]):
        kinds = {change.kind for change in group} | ({"length"} if cut else set())
        if any(remedy.kinds <= kinds for remedy in found):
            continue
        if group not in known:
            known[group] = Remedy.of(fit.scenario, *group)
        remedy = _shortened(fit.scenario, known[group]) if cut else known[group]
        if remedy is not None and remedy.fit.fits:
            found.append(remedy)
            if len(found) == limit:
                break
    return found


def _shortened(scenario: Scenario, remedy: Remedy) -> Remedy | None:
    """With sequences as long as the cache then holds, in whole thousands; None where that is too short."""
    changed, length = remedy.fit.scenario, remedy.fit.shared.tokens // LENGTH_STEP * LENGTH_STEP
    shortest = max(MIN_LENGTH, changed.input_len + changed.output_len)
    if remedy.fit.problems or not shortest <= length < changed.max_model_len:
        return None
    return Remedy.of(scenario, *remedy.changes, shorter(length))


BATCH = 32  # sequences on all engines together, for comparing speeds
MIN_TOKENS, MIN_RATE = 1.25, 1.10  # ratios that are worth a mention
KINDS = ("dcp", "kv", "split", "scheme")


@dataclass(frozen=True)
class Improvement:
    """A change and its gain over the set-up as it is.

    Attributes:
        tokens: ratio of the tokens that all engines' caches hold.
        rate: ratio of the estimated decoding rate at `BATCH` sequences.
    """

    remedy: Remedy
    tokens: float
    rate: float


def improvements(fit: Fit) -> list[Improvement]:
    """The best change of each kind that gains a quarter in tokens or a tenth in speed; and the fewest GPUs that fit."""
    best: dict[str, Improvement] = {}
    for change in possible_changes(fit.scenario):
        kind = change.kind.split()[0]
        improvement = _improvement(fit, change) if kind in KINDS else None
        if improvement is None or (improvement.tokens < MIN_TOKENS and improvement.rate < MIN_RATE):
            continue
        if kind not in best or improvement.tokens * improvement.rate > best[kind].tokens * best[kind].rate:
            best[kind] = improvement
    fewer = _fewest_gpus(fit)
    return [*best.values(), *([fewer] if fewer else [])]


def _improvement(fit: Fit, change: Change) -> Improvement | None:
    remedy = Remedy.of(fit.scenario, change)
    if not remedy.fit.fits:
        return None
    return Improvement(remedy, _tokens(remedy.fit) / _tokens(fit), _rate(remedy.fit) / _rate(fit))


def _tokens(fit: Fit) -> int:
    return fit.shared.tokens * fit.scenario.replicas


def _rate(fit: Fit) -> float:
    return decode(fit.scenario, max(1, BATCH // fit.scenario.replicas)).estimate


def _fewest_gpus(fit: Fit) -> Improvement | None:
    scenario = fit.scenario
    schemes = [scenario.scheme] if scenario.quantised else [SCHEMES[name] for name in SCHEME_PRICES]
    for gpus in (count for count in COUNTS if count < scenario.gpus):
        for scheme in schemes:
            for tensor, stages in arrangements(scenario.network, gpus):
                values = {"gpus": gpus, "tensor": tensor, "pipeline": stages, "dcp": 1, "scheme": scheme}
                flags = f"--gpus {gpus} --tp {tensor}" + (f" --pp {stages}" if stages > 1 else "")
                flags += f" --scheme {scheme.name}" if scheme is not scenario.scheme else ""
                change = Change(values, flags, plural(scenario.gpus - gpus, "fewer GPU"), 0, "gpus")
                if improvement := _improvement(fit, change):
                    return improvement
    return None
