"""The kernel of decode attention against a softmax in float64, from caches that vLLM's own kernel has written."""

import itertools

import pytest
import torch
import vllm._custom_ops as ops
from vllm.utils.torch_utils import set_default_torch_dtype

from hunyuan_vllm import cpu_kernels
from hunyuan_vllm.cpu_attention import VECTOR_LAYOUT, decode_backend
from hunyuan_vllm.cpu_kernels import CPU
from hunyuan_vllm.native import operators

pytestmark = pytest.mark.skipif(not operators.available(), reason="needs a CPU and a compiler for the C++ kernels")


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize(
    ("heads", "key_heads", "size"), [(16, 8, 128), (3, 1, 64), (8, 8, 96), (20, 4, 32), (16, 1, 128)]
)
@pytest.mark.parametrize(("block", "lengths"), [(128, [1, 32, 33, 128, 129, 300]), (32, [64, 31, 97]), (96, [1500])])
def test_decode_attention(threads: int, heads: int, key_heads: int, size: int, block: int, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(lengths))
    blocks = [-(-length // block) for length in lengths]
    # Blocks of all sequences in random order, and one more that holds what nobody may read.
    order = torch.randperm(sum(blocks), generator=generator, dtype=torch.int32)
    cache = torch.full((sum(blocks) + 1, key_heads, block, 2 * size), torch.nan, dtype=torch.bfloat16)
    table = torch.full((len(lengths), max(blocks)), sum(blocks), dtype=torch.int32)
    query = torch.randn(len(lengths), heads, size, generator=generator).bfloat16() * 3
    expected = torch.empty(query.shape, dtype=torch.float64)
    for n, (length, start) in enumerate(zip(lengths, itertools.accumulate(blocks, initial=0), strict=False)):
        table[n, : blocks[n]] = order[start : start + blocks[n]]
        slots = (table[n, : blocks[n], None].long() * block + torch.arange(block)).flatten()[:length]
        keys, values = torch.randn(2, length, key_heads, size, generator=generator).bfloat16()
        halves = cache.view(len(cache), key_heads, 2 * block, size).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(keys, values, *halves, slots, VECTOR_LAYOUT)
        keys, values = (x.double().repeat_interleave(heads // key_heads, 1) for x in (keys, values))
        powers = (torch.einsum("hd,thd->ht", query[n].double(), keys) * size**-0.5).softmax(-1)
        expected[n] = torch.einsum("ht,thd->hd", powers, values)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output = torch.full_like(query, torch.nan)
        lengths_tensor = torch.tensor(lengths, dtype=torch.int32)
        torch.ops.hunyuan_vllm.decode_attention(output, query, cache, table, lengths_tensor, size**-0.5)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(output.double(), expected, rtol=2**-7, atol=2e-3)


@pytest.mark.parametrize(
    ("head_size", "dtype", "cache", "cpu", "chosen"),
    [
        (128, torch.bfloat16, "auto", CPU.AVX512, False),
        (128, torch.bfloat16, "auto", CPU.AVX2, True),
        (128, torch.bfloat16, "auto", CPU.AMX, False),
        (128, torch.float32, "auto", CPU.AVX2, False),
        (128, torch.bfloat16, "fp8", CPU.AVX2, False),
        (80, torch.bfloat16, "auto", CPU.AVX2, False),
    ],
)
def test_where_it_is_used(
    head_size: int, dtype: torch.dtype, cache: str, cpu: CPU, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernels, "cpu", lambda: cpu)
    with set_default_torch_dtype(dtype):
        assert (decode_backend(head_size, cache) is not None) == chosen
