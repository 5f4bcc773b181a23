"""Weight scales against a plain search over the weights themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hunyuan_vllm.quant.rounding import quantize_per_channel
from hunyuan_vllm.quantize.formats import row_scales, tensor_scale

MSE, TOP = "mse", "max"


def alike(*shape: int, seed: int = 0) -> Tensor:
    """Magnitudes of which the largest, as 448, would lie where E4M3's steps are coarsest."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (signs * (1 - 0.2 * torch.rand(*shape, generator=generator))).bfloat16()


def fp8_error(weight: Tensor, scale: float) -> float:
    rounded = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return float((rounded - weight.float()).double().square().sum())


def test_the_plain_scale_takes_the_largest_of_all_weights() -> None:
    first, second = alike(8, 16), alike(24, 16, seed=1) * 3
    assert tensor_scale([first, second], TOP) == pytest.approx(float(torch.cat((first, second)).abs().max()) / 448)
    assert tensor_scale([torch.zeros(2, 2)], TOP) == tensor_scale([torch.zeros(2, 2)], MSE) == 1.0


def test_the_least_squares_scale_is_the_best_of_a_fine_search() -> None:
    weights = [alike(64, 64), alike(32, 64, seed=1)]
    scale = tensor_scale(weights, MSE)
    whole = torch.cat(weights)
    widest = tensor_scale(weights, TOP)
    searched = [fp8_error(whole, widest * 2 ** (step / 50)) for step in range(-200, 50)]
    assert fp8_error(whole, scale) <= min(searched) * 1.03
    assert fp8_error(whole, scale) < 0.7 * fp8_error(whole, widest)


def test_plain_row_scales_are_those_of_the_loader() -> None:
    weight = torch.randn(700, 500).bfloat16()  # more than one block
    weight[3] = 0
    assert torch.equal(row_scales(weight, TOP), quantize_per_channel(weight)[1])


def test_least_squares_row_scales_are_the_best_of_a_fine_search() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 20_000, generator=generator)
    weight[:6, 0] = 6.0  # one outlier a row
    weight[11] = 0

    def errors(scale: Tensor) -> Tensor:
        return ((weight / scale).round().clamp(-127, 127) * scale - weight).square().sum(1)

    chosen, plain = row_scales(weight, MSE), row_scales(weight, TOP)
    searched = torch.stack([errors(plain * (1 - step / 200)) for step in range(140)]).amin(0)
    assert (errors(chosen) <= 1.1 * searched + 1e-12).all() and errors(chosen).sum() <= 1.03 * searched.sum()
    assert (errors(chosen) <= errors(plain)).all() and errors(chosen).sum() < errors(plain).sum()
    assert chosen[11] == 1.0
