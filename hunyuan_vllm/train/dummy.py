"""Random tokens instead of conversations, all rows of full length: what a set-up can do, without a data file."""

from __future__ import annotations

import torch

from hunyuan_vllm.train.tokens import Example

__all__ = ["DummyDataset"]


class DummyDataset(torch.utils.data.Dataset[Example]):
    """`length` rows of `tokens` ids below `vocabulary`, all learned; the same each time."""

    def __init__(self, vocabulary: int, tokens: int, length: int = 1000) -> None:
        self._vocabulary, self._tokens, self._length = vocabulary, tokens, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._length:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(self._vocabulary, (self._tokens,), generator=generator).tolist()
        return Example(ids, list(ids))
