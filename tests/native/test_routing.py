"""Routing's two kernels against torch in float64."""

from __future__ import annotations

import pytest
import torch

from hunyuan_vllm.native import operators

pytestmark = pytest.mark.skipif(not operators.available(), reason="needs a CPU and a compiler for the C++ kernels")


@pytest.mark.parametrize(("experts", "hidden"), [(16, 1280), (4, 192), (20, 130), (1, 8)])
def test_logits(experts: int, hidden: int) -> None:
    generator = torch.Generator().manual_seed(experts)
    gate = torch.randn(experts, hidden, generator=generator)
    for tokens in (0, 1, 3, 4, 9, 300):
        x = torch.randn(tokens, 2 * hidden, generator=generator).bfloat16()[:, hidden:]
        logits = torch.ops.hunyuan_vllm.router_logits(x, gate)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), x.double() @ gate.double().t(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("experts", [2, 16, 20])
@pytest.mark.parametrize(("topk", "renormalize"), [(1, False), (2, True), (2, False)])
def test_choice(experts: int, topk: int, renormalize: bool) -> None:
    generator = torch.Generator().manual_seed(experts)
    for spread in (0.1, 1, 100):
        logits = spread * torch.randn(50, experts, generator=generator)
        weights, ids = torch.ops.hunyuan_vllm.choose_experts(logits, topk, renormalize)
        expected, best = logits.double().softmax(-1).topk(topk)
        if renormalize:
            expected /= expected.sum(-1, keepdim=True)
        assert weights.dtype == torch.float32 and ids.dtype == torch.int32
        assert torch.equal(ids.long(), best)
        torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
