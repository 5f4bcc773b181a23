"""Large matrices a few rows at a time, so that float32 copies of them stay small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ELEMENTS", "row_blocks"]

ELEMENTS = 1 << 18  # 1 MiB in float32, which stays in a core's cache


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices over the rows of `matrix [rows, columns]`, of about `ELEMENTS` elements."""
    rows, columns = matrix.shape
    step = max(1, ELEMENTS // columns)
    return (slice(start, start + step) for start in range(0, rows, step))
