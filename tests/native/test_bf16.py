"""The bfloat16 products against torch's of the same numbers in float64, and where vLLM's layers use them."""

from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config, write_checkpoint
from engine import TRACED, engine, random_prompts, score
from torch import Tensor, nn
from torch.nn.functional import silu

from hunyuan_vllm.cpu import multiply_natively
from hunyuan_vllm.cpu_kernels import LINEAR, Kernel, kernel
from hunyuan_vllm.quant.schemes import BF16

pytestmark = pytest.mark.skipif(
    kernel(BF16, LINEAR) is not Kernel.OURS, reason="needs a compiler, and a CPU that has no faster kernel"
)
ROWS = (0, 1, 2, 3, 7, 16, 65, 300)
TOLERANCE = 3e-3  # bfloat16 rounds a result by up to 2^-9
EXPERTS_TOLERANCE = 6e-3  # and what is between the two products


def close(result: Tensor, expected: Tensor, tolerance: float) -> bool:
    assert result.shape == expected.shape and result.dtype == torch.bfloat16 and result.is_contiguous()
    return result.numel() == 0 or ((result.double() - expected).norm() / expected.norm()).item() < tolerance


def pack(weight: Tensor) -> Tensor:
    return torch.ops.hunyuan_vllm.bf16_pack_experts(weight)


@pytest.mark.parametrize(("outputs", "inputs"), [(96, 128), (100, 70), (33, 31), (256, 192), (1, 1), (16, 5)])
def test_linear(outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    packed, bias = pack(weight.unsqueeze(0))[0], torch.randn(outputs, generator=generator)
    for rows in ROWS:
        x = torch.randn(rows, 2 * inputs, generator=generator).bfloat16()[:, inputs:]
        expected = x.double() @ weight.double().t()
        for given in (None, bias):
            result = torch.ops.hunyuan_vllm.bf16_linear(x, packed, given, outputs)
            assert close(result, expected if given is None else expected + given.double(), TOLERANCE), rows


def gated(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    gate, up = (x.double() @ first.double().t()).chunk(2, dim=-1)
    return (silu(gate) * up) @ second.double().t()


@pytest.mark.parametrize(("hidden", "width"), [(64, 48), (66, 25), (192, 128)])
@pytest.mark.parametrize("topk", [1, 2, 8])
@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
def test_experts(hidden: int, width: int, topk: int, shared: bool) -> None:
    generator = torch.Generator().manual_seed(hidden)

    def weight(*shape: int) -> Tensor:
        return (0.2 * torch.randn(shape, generator=generator)).bfloat16()

    first, second = weight(11, 2 * width, hidden), weight(11, hidden, width)
    own = (weight(2 * width, hidden), weight(hidden, width)) if shared else ()
    packed_own = [pack(tensor.unsqueeze(0))[0] for tensor in own] or [None, None]
    for rows in (0, 1, 2, 7, 40):
        x = torch.randn(rows, hidden, generator=generator).bfloat16()
        gates = torch.rand(rows, topk, generator=generator)
        some = torch.rand(rows, 11, generator=generator).topk(topk).indices.int()  # experts without rows among them
        same = torch.arange(10, 10 - topk, -1).int().expand(rows, topk).contiguous()
        for ids in (some, same):
            result = torch.ops.hunyuan_vllm.bf16_experts(x, pack(first), pack(second), gates, ids, width, *packed_own)
            expected = gated(x, *own) if shared else torch.zeros(rows, hidden, dtype=torch.float64)
            for row in range(rows):
                for gate, expert in zip(gates[row].double(), ids[row].tolist(), strict=True):
                    expected[row] += gate * gated(x[row : row + 1], first[expert], second[expert])[0]
            assert close(result, expected, EXPERTS_TOLERANCE), rows


@pytest.mark.parametrize(("hidden", "width"), [(64, 48), (66, 25)])
def test_mlp(hidden: int, width: int) -> None:
    generator = torch.Generator().manual_seed(hidden)
    first = (0.2 * torch.randn(2 * width, hidden, generator=generator)).bfloat16()
    second = (0.2 * torch.randn(hidden, width, generator=generator)).bfloat16()
    packed = pack(first.unsqueeze(0))[0], pack(second.unsqueeze(0))[0]
    for rows in ROWS:
        x = torch.randn(rows, hidden, generator=generator).bfloat16()
        result = torch.ops.hunyuan_vllm.bf16_mlp(x, *packed, width)
        assert close(result, gated(x, first, second), EXPERTS_TOLERANCE), rows


def test_not_a_number_and_infinity() -> None:
    """They come out where they went in, and nowhere else."""
    weight = torch.eye(32).bfloat16()
    x = torch.ones(3, 32).bfloat16()
    x[1, 5], x[2] = float("nan"), float("inf")
    result = torch.ops.hunyuan_vllm.bf16_linear(x, pack(weight.unsqueeze(0))[0], None, 32)
    assert torch.equal(result[0], x[0]) and result[1].isnan().all() and not result[2].isfinite().any()


@pytest.mark.parametrize("keeps", [False, True], ids=["replaced", "kept"])
def test_a_layer(keeps: bool) -> None:
    layer = nn.Linear(70, 33).bfloat16().requires_grad_(False)
    x = torch.randn(4, 70).bfloat16()
    expected = x.double() @ layer.weight.double().t() + layer.bias.double()
    weight = layer.weight.clone()
    assert multiply_natively(layer, remove_weight=not keeps)
    result = layer.cpu_linear(x, layer.weight, layer.bias)
    assert close(result, expected, TOLERANCE)
    assert torch.equal(layer.weight, weight) if keeps else layer.weight.dtype == torch.uint8


def test_layers_for_torch() -> None:
    """Other types than bfloat16, and weights that are not matrices or not there."""
    for weight in (torch.ones(4, 4), torch.ones(4, 4, 4).bfloat16(), torch.ones(4, 4, device="meta").bfloat16()):
        layer = nn.Module()
        layer.weight = nn.Parameter(weight, requires_grad=False)
        assert not multiply_natively(layer, remove_weight=True)
        assert layer.weight is not None and layer.weight.shape == weight.shape


def test_compiled() -> None:
    """torch.compile knows the results' shapes, with rows of any number."""
    packed = pack(torch.randn(1, 64, 32).bfloat16())[0]

    def twice(x: Tensor) -> Tensor:
        return torch.ops.hunyuan_vllm.bf16_linear(x, packed, None, 64) * 2

    compiled = torch.compile(twice, dynamic=True, fullgraph=True)
    for rows in (2, 5):
        x = torch.randn(rows, 32).bfloat16()
        assert torch.equal(compiled(x), twice(x))


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, TRACED], ids=["eager", "traced"])
def test_reload(options: dict, tmp_path: Path) -> None:
    """An engine whose weights are replaced answers as one that began with them."""
    config = tiny_config()
    first, other = (write_checkpoint(tmp_path / str(seed), config, seed=seed) for seed in (1, 2))
    prompts = random_prompts(config.vocab_size, [60])
    with engine(first, dtype="bfloat16", **options) as llm:
        before = score(llm, prompts)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        llm.reset_prefix_cache()
        after = score(llm, prompts)
    with engine(other, dtype="bfloat16", **options) as llm:
        assert after == score(llm, prompts) != before
