"""Blocks of rows, in several threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hunyuan_vllm.quant.schemes import WRITTEN
from hunyuan_vllm.quantize import formats
from hunyuan_vllm.quantize.formats import FORMATS, in_blocks
from hunyuan_vllm.quantize.verify import compare


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(formats, "ELEMENTS", 64)
    # vLLM's CPU worker, where one ran in this process, leaves a function in its place that changes nothing.
    monkeypatch.setattr(torch, "set_num_threads", torch._C.set_num_threads)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def test_every_row_once_and_in_order(threads: int) -> None:
    matrix = torch.arange(70).view(35, 2)
    assert torch.equal(torch.cat(in_blocks(matrix, lambda rows: matrix[rows])), matrix)
    assert len(in_blocks(matrix, lambda rows: rows)) == 2
    assert in_blocks(torch.zeros(3, 1000), lambda rows: rows.start) == [0, 1, 2]  # a row may be larger


def test_each_thread_works_alone(threads: int) -> None:
    if threads > 1:
        assert set(in_blocks(torch.zeros(90, 2), lambda rows: torch.get_num_threads())) == {1}


def test_an_error_in_a_block_is_the_callers(threads: int) -> None:
    def fail(rows: slice) -> None:
        raise ValueError(f"from {rows.start}")

    with pytest.raises(ValueError, match="from 0"):
        in_blocks(torch.zeros(90, 2), fail)


@pytest.mark.parametrize("scheme", WRITTEN)
def test_results_do_not_depend_on_blocks(threads: int, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    made = FORMATS[scheme]

    def run() -> tuple[dict, tuple]:
        (stored,) = made.encode([weight])
        return stored, compare(made, weight, stored)

    stored, found = run()
    monkeypatch.setattr(formats, "ELEMENTS", 1 << 20)
    whole, wanted = run()
    assert all(torch.equal(stored[key].float(), whole[key].float()) for key in whole)
    assert found == pytest.approx(wanted) and found.wrong == 0
