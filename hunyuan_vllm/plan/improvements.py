"""What would be better where a set-up fits already: more context, more speed, or fewer GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from hunyuan_vllm.plan.changes import COUNTS, Change, arrangements, gpu_count, possible_changes
from hunyuan_vllm.plan.rates import decode
from hunyuan_vllm.plan.remedies import Remedy, apply_changes
from hunyuan_vllm.plan.schemes import SCHEMES
from hunyuan_vllm.plan.verdict import Verdict, judge

__all__ = ["BATCH", "Improvement", "improvements"]

BATCH = 32  # sequences that speeds are compared at, in all
WORTH_TOKENS, WORTH_RATE = 1.25, 1.10
KINDS = ("dcp", "kv", "split", "scheme")


@dataclass(frozen=True)
class Improvement:
    """A change and what it brings, against the set-up as it is.

    Attributes:
        tokens: ratio of the tokens that all engines hold.
        rate: ratio of the estimated decoding rate at `BATCH` sequences.
    """

    remedy: Remedy
    tokens: float
    rate: float


def improvements(verdict: Verdict, any_checkpoint: bool = True) -> list[Improvement]:
    """Changes of options that gain a quarter in tokens or a tenth in speed, the best of each kind; and the fewest GPUs
    that would do."""
    best: dict[str, Improvement] = {}
    for change in possible_changes(verdict.scenario, any_checkpoint):
        kind = change.kind.split()[0]
        improvement = _against(verdict, change) if kind in KINDS else None
        if improvement is None or (improvement.tokens < WORTH_TOKENS and improvement.rate < WORTH_RATE):
            continue
        if kind not in best or improvement.tokens * improvement.rate > best[kind].tokens * best[kind].rate:
            best[kind] = improvement
    fewer = _fewest_gpus(verdict, any_checkpoint)
    return [*best.values(), *([fewer] if fewer else [])]


def _against(verdict: Verdict, change: Change) -> Improvement | None:
    changed = judge(apply_changes(verdict.scenario, (change,)))
    if not changed.fits:
        return None
    return Improvement(Remedy((change,), changed), _tokens(changed) / _tokens(verdict), _rate(changed) / _rate(verdict))


def _tokens(verdict: Verdict) -> int:
    return verdict.shared.tokens * verdict.scenario.replicas


def _rate(verdict: Verdict) -> float:
    return decode(verdict.scenario, max(1, BATCH // verdict.scenario.replicas)).estimate


def _fewest_gpus(verdict: Verdict, any_checkpoint: bool) -> Improvement | None:
    scenario = verdict.scenario
    schemes = list(SCHEMES.values()) if any_checkpoint else [scenario.scheme]
    for gpus in (count for count in COUNTS if count < scenario.gpus):
        for scheme in schemes:
            for tensor, stages in arrangements(scenario.network, gpus):
                values = {"gpus": gpus, "tensor": tensor, "pipeline": stages, "dcp": 1, "scheme": scheme}
                flags = f"--gpus {gpus} --tp {tensor}" + (f" --pp {stages}" if stages > 1 else "")
                flags += f" --scheme {scheme.name}" if scheme is not scenario.scheme else ""
                change = Change(values, flags, f"{gpu_count(scenario.gpus - gpus)} less", 0, "gpus")
                if improvement := _against(verdict, change):
                    return improvement
    return None
