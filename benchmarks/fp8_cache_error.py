"""What an FP8 KV cache costs in accuracy, K and V apart, and how much of it the choice of scales decides.

    python benchmarks/fp8_cache_error.py

In plain PyTorch, on the reference model in float32: only what a cache holds is rounded. "Folded" is ours: one K for a
CLA group, divided by its rms and without a norm's weight, with the scale that its bound gives; "unfolded" is a K for
each layer, after the layer's own norm, with the best scale for the very text it is measured on. Of the trained demo
model, on its held-out questions, and of random ones. Each figure is against the same model with an exact cache; its
range is over scales times 1, 2^(1/4), 2^(1/2) and 2^(3/4), and over the seeds of random models.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Report, Spread, note, options, random_checkpoint
from torch import Tensor, nn
from transformers import AutoTokenizer

from hunyuan_vllm import demo
from hunyuan_vllm.evaluation.passages import Passage, held_out_questions
from hunyuan_vllm.plugin import register
from hunyuan_vllm.quant.fp8 import normalised_key_scale
from hunyuan_vllm.quant.rounding import E4M3_MAX, round_through_fp8
from hunyuan_vllm.reference import HunYuanForCausalLM

# E4M3 repeats itself with every factor of 2, so which numbers lie near which of its values is luck between these.
PHASES = [2 ** (quarter / 4) for quarter in range(4)]

Rounding = Callable[[Tensor, int], Tensor]
"""(what is cached, the layer that caches it) → what is read back."""


def exact(x: Tensor, layer: int) -> Tensor:
    return x


def bfloat16(x: Tensor, layer: int) -> Tensor:
    return x.bfloat16().float()


def fp8(scale: Callable[[int], float]) -> Rounding:
    return lambda x, layer: round_through_fp8(x, scale(layer))


def truncated(scale: Callable[[int], float]) -> Rounding:
    """E4M3 towards zero, as vLLM's CPU kernel would store it by itself."""

    def read(x: Tensor, layer: int) -> Tensor:
        values = (x / scale(layer)).clamp(-E4M3_MAX, E4M3_MAX)
        step = torch.exp2((torch.frexp(values).exponent - 4).clamp_min(-9).float())
        return (values / step).trunc() * step * scale(layer)

    return read


@dataclass(frozen=True)
class Cache:
    """How a cache is kept; `folded`: K is rounded before the norm's weight rather than after it."""

    k: Rounding = exact
    v: Rounding = exact
    folded: bool = True


class CachedKey(nn.Module):
    """A key norm whose K comes from a cache."""

    def __init__(self, norm: nn.Module, layer: int, cache: Cache) -> None:
        super().__init__()
        self.norm, self.layer, self.cache = norm, layer, cache

    def forward(self, k: Tensor) -> Tensor:
        if not self.cache.folded:
            return self.cache.k(self.norm(k), self.layer)
        unit = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + self.norm.eps)
        return self.cache.k(unit, self.layer) * self.norm.weight


@contextmanager
def cached(model: HunYuanForCausalLM, cache: Cache) -> Iterator[None]:
    """The model with that cache."""
    norms, hooks = [], []
    for number, layer in enumerate(model.model.layers):
        attn = layer.self_attn
        norms.append(attn.key_layernorm)
        attn.key_layernorm = CachedKey(attn.key_layernorm, number, cache)
        if not attn.is_cross:
            hooks.append(attn.v_proj.register_forward_hook(lambda _, __, v, number=number: cache.v(v, number)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, norm in zip(model.model.layers, norms, strict=True):
            layer.self_attn.key_layernorm = norm


@torch.inference_mode()
def logprobs(model: HunYuanForCausalLM, passages: Sequence[Passage]) -> Tensor:
    """Of every token of the vocabulary at every scored position, `[positions, vocabulary]`."""
    rows = []
    for passage in passages:
        logits = model(torch.tensor([passage.ids])).logits[0]
        rows.append(logits[torch.tensor(passage.scored) - 1].log_softmax(-1))
    return torch.cat(rows)


def measure_scales(model: HunYuanForCausalLM, passages: Sequence[Passage]) -> tuple[dict[int, float], dict[int, float]]:
    """The scales of K, after each layer's norm, and of V at which nothing in these passages saturates."""
    greatest: dict[str, dict[int, float]] = {"k": defaultdict(float), "v": defaultdict(float)}

    def watch(which: str) -> Rounding:
        def read(x: Tensor, layer: int) -> Tensor:
            greatest[which][layer] = max(greatest[which][layer], x.abs().max().item() / E4M3_MAX)
            return x

        return read

    with cached(model, Cache(watch("k"), watch("v"), folded=False)):
        logprobs(model, passages)
    return greatest["k"], greatest["v"]


def caches(
    model: HunYuanForCausalLM,
    k_best: dict[int, float],
    v_best: dict[int, float],
    v_elsewhere: dict[int, float],
    factor: float,
) -> dict[str, Cache]:
    """What is compared, by name; every scale is multiplied by `factor`."""
    bound, owner = normalised_key_scale(model.config.head_dim), model.config.kv_owner

    def scaled(scale: Callable[[int], float]) -> Callable[[int], float]:
        return lambda layer: scale(layer) * factor

    k, v = scaled(lambda _: bound), scaled(v_elsewhere.__getitem__)
    k_ideal, v_ideal = scaled(k_best.__getitem__), scaled(v_best.__getitem__)
    return {
        "K and V: bfloat16": Cache(bfloat16, bfloat16),
        "K and V: folded (ours)": Cache(fp8(k), fp8(v)),
        "K and V: unfolded, best scales": Cache(fp8(k_ideal), fp8(v_ideal), folded=False),
        "K and V: ours, truncated": Cache(truncated(k), truncated(v)),
        "K: folded, scale of its bound (ours)": Cache(k=fp8(k)),
        "K: folded, scale 1": Cache(k=fp8(scaled(lambda _: 1.0))),
        "K: folded, scale calibrated on weighted keys": Cache(k=fp8(lambda layer: k_ideal(owner(layer)))),
        "K: unfolded, best scales": Cache(k=fp8(k_ideal), folded=False),
        "V: scale of other text (ours)": Cache(v=fp8(v)),
        "V: best scale": Cache(v=fp8(v_ideal)),
        "V: scale 1 (no v_scale)": Cache(v=fp8(scaled(lambda _: 1.0))),
        "V: 64 times the best scale": Cache(v=fp8(lambda layer: v_ideal(layer) * 64)),
        "V: 1/64 of the best scale": Cache(v=fp8(lambda layer: v_ideal(layer) / 64)),
    }


def compare(
    model: HunYuanForCausalLM, passages: Sequence[Passage], factor: float
) -> dict[str, tuple[float, float, float]]:
    """By name: mean |Δ log p| of the text's tokens, KL in nats a token, and the share of equal first choices."""
    half = len(passages) // 2
    _, v_elsewhere = measure_scales(model, passages[:half])
    passages = passages[half:]
    k_best, v_best = measure_scales(model, passages)
    tokens = torch.tensor([passage.ids[position] for passage in passages for position in passage.scored])[:, None]
    right = logprobs(model, passages)
    errors = {}
    for name, cache in caches(model, k_best, v_best, v_elsewhere, factor).items():
        with cached(model, cache):
            ours = logprobs(model, passages)
        difference = (ours.gather(1, tokens) - right.gather(1, tokens)).abs().mean().item()
        divergence = (right.exp() * (right - ours)).sum(-1).mean().item()
        errors[name] = (difference, max(divergence, 0.0), (ours.argmax(-1) == right.argmax(-1)).float().mean().item())
    return errors


def demo_model(questions: int) -> tuple[HunYuanForCausalLM, list[Passage]]:
    register()
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    chosen = held_out_questions(questions)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(chosen), generator=generator).tolist()
    model = HunYuanForCausalLM.from_pretrained(demo.path(), dtype=torch.float32)
    return model, [chosen[number].passage(tokenizer) for number in order]


def random_model(head_dim: int, seed: int, folder: Path) -> tuple[HunYuanForCausalLM, list[Passage]]:
    random_checkpoint(folder, "tiny_config", head_dim=head_dim, num_hidden_layers=6, hidden_size=256, seed=seed)
    model = HunYuanForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (16, 96), generator=generator).tolist()
    return model, [Passage(row, list(range(1, len(row)))) for row in ids]


def add(report: Report, table: str, runs: Sequence[dict[str, tuple[float, float, float]]]) -> None:
    for name in runs[0]:
        differences, divergences, same = zip(*(run[name] for run in runs), strict=True)
        report.add(
            table,
            cache=name,
            mean_dlogp=Spread.of(differences),
            KL=Spread.of(divergences),
            same_top_1=f"{math.fsum(same) / len(same):.2%}",
        )


def main() -> None:
    parser = options(__doc__, None)
    parser.add_argument("--questions", type=int, default=10, help="held-out questions of a kind (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=8, help="random models of each head size (default: %(default)s)")
    arguments: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report("fp8_cache_error", arguments)
    model, passages = demo_model(arguments.questions)
    runs = []
    for factor in PHASES:
        note(f"demo model, scales times {factor:.2f}")
        runs.append(compare(model, passages, factor))
    add(report, f"trained demo model: median (least–most) of {len(PHASES)} phases", runs)
    for head_dim in (32, 64, 128):
        note(f"random models, head_dim {head_dim}")
        with tempfile.TemporaryDirectory() as scratch:
            runs = [
                compare(*random_model(head_dim, seed, Path(scratch) / str(seed)), PHASES[seed % len(PHASES)])
                for seed in range(arguments.seeds)
            ]
        add(report, f"random models, head_dim {head_dim}: median (least–most) of {arguments.seeds} seeds", runs)
    report.show()


if __name__ == "__main__":
    main()
