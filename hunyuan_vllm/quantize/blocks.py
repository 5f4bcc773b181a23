"""Large matrices a few rows at a time: float32 copies stay small, and every core has blocks of its own to work on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["ELEMENTS", "in_blocks"]

ELEMENTS = 1 << 18  # 1 MiB in float32, which stays in a core's cache

T = TypeVar("T")


def in_blocks(matrix: Tensor, work: Callable[[slice], T]) -> list[T]:
    """`work` on slices over the rows of `matrix [rows, columns]`, each of about `ELEMENTS` elements; results in order.

    On a CPU with several threads at once. Torch would share out each operation instead, and make its threads wait for
    each other after every one: with operations this small and other programs on the machine, most of the time.
    """
    rows, columns = matrix.shape
    step = max(1, ELEMENTS // columns)
    slices = [slice(start, start + step) for start in range(0, rows, step)]
    threads = torch.get_num_threads()
    if threads == 1 or len(slices) == 1 or matrix.device.type != "cpu":
        return [work(each) for each in slices]
    torch.set_num_threads(1)  # which the threads of the pool start with
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, slices))
    finally:
        torch.set_num_threads(threads)
