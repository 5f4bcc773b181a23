"""Outliers, planted in a checkpoint: what the plain scales make of them, and what each option does about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import rewrite, tiny_config, write_checkpoint
from served import served
from torch import Tensor

from hunyuan_vllm.quantize.convert import quantize_checkpoint
from hunyuan_vllm.reference import HunYuanForCausalLM

Documents = list[list[int]]
CHANNELS = [3, 40]


def plant(directory: Path, times: float) -> None:
    """Make two channels of the norms' outputs `times` as large as the others (or as small, below 1), and the columns of
    all weights that read them the inverse: the network stays as it was."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
                tensor[CHANNELS] *= times
            elif name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "wg"):
                tensor[:, CHANNELS] /= times

    rewrite(directory, change)


@torch.inference_mode()
def divergence(model: HunYuanForCausalLM, exact: HunYuanForCausalLM, documents: Documents) -> float:
    """Mean KL of the next token's distributions, in nats."""
    found = []
    for document in documents:
        ids = torch.tensor([document])
        ours, wanted = (each(ids).logits.log_softmax(-1) for each in (model, exact))
        found.append(torch.nn.functional.kl_div(ours, wanted, log_target=True, reduction="none").sum(-1).mean())
    return float(torch.stack(found).mean())


Loss = Callable[..., float]


@pytest.fixture
def loss(tmp_path: Path, documents: Documents) -> Loss:
    """What converting a checkpoint with planted outliers costs, by scheme and options."""
    sources: dict[float, tuple[Path, HunYuanForCausalLM]] = {}

    def measure(times: float, scheme: str, **options: object) -> float:
        if times not in sources:
            directory = write_checkpoint(tmp_path / f"src-{times}", tiny_config(num_hidden_layers=2), seed=5)
            plant(directory, times)
            sources[times] = directory, HunYuanForCausalLM.from_pretrained(directory, dtype=torch.float32)
        source, exact = sources[times]
        target = tmp_path / f"{scheme}-{len(list(tmp_path.iterdir()))}"
        quantize_checkpoint(source, target, scheme, calibration=documents[:2], **options)
        return divergence(served(target), exact, documents[2:])

    return measure


def test_large_activations_in_int8(loss: Loss) -> None:
    """A token's scale has to reach the outliers, which leaves few levels for the other channels."""
    clean, plain, smooth = loss(1.0, "int8-w8a8"), loss(200.0, "int8-w8a8"), loss(200.0, "int8-w8a8", smooth=0.5)
    assert plain > 20 * clean
    assert smooth < 0.1 * plain and smooth < 3 * clean


@pytest.mark.parametrize("scheme", ["int8", "int8-w8a8"])
def test_large_weights_in_int8(loss: Loss, scheme: str) -> None:
    """Columns of large weights, which small inputs meet, decide each row's scale."""
    clean, plain = loss(1.0, scheme), loss(1 / 512, scheme)
    smooth = loss(1 / 512, scheme, smooth=0.5)
    assert plain > 20 * clean
    assert smooth < 0.05 * plain and smooth < 8 * clean


@pytest.mark.parametrize("times", [2.0**17, 2.0**-17])
def test_fp8_needs_help_only_beyond_its_wide_range(loss: Loss, times: float) -> None:
    clean, moderate, plain = (loss(each, "fp8") for each in (1.0, 256.0 if times > 1 else 1 / 256, times))
    smooth = loss(times, "fp8", smooth=0.5)
    assert moderate < 2 * clean
    assert plain > 5 * clean and smooth < 2 * clean
