"""Collators: examples to the tensors of a batch"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hunyuan_vllm.train.tokens import IGNORED, Example


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


def pad_batch(examples: Sequence[Example], pad: int, multiple: int = 1) -> dict[str, Tensor]:
    """One example a row, padded on the right to the longest: `input_ids`, `labels`, `attention_mask`, [rows, tokens].

    Args:
        pad: the padding token; nothing attends to it, and it is not learned.
        multiple: row lengths are rounded up to a multiple of it.
    """
    ids, labels, _, owners = _rows([[example] for example in examples], pad, multiple)
    return {"input_ids": ids, "labels": labels, "attention_mask": (owners >= 0).long()}


def pack_batch(rows: Sequence[Sequence[Example]], pad: int, multiple: int = 1) -> dict[str, Tensor]:
    """Several examples a row (see `PackedDataset`), each of which attends to itself only, from position 0.

    Returns `input_ids`, `labels`, `position_ids`, [rows, tokens], and a boolean `attention_mask`,
    [rows, 1, tokens, tokens]. An example's first token has no label, since another example precedes it.
    """
    ids, labels, positions, owners = _rows(rows, pad, multiple)
    width = ids.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same = (owners[:, :, None] == owners[:, None, :]) & (owners[:, :, None] >= 0)
    mask = causal & same | torch.eye(width, dtype=torch.bool)  # padding sees itself: a row of -inf would be NaN
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask[:, None]}


def _rows(rows: Sequence[Sequence[Example]], pad: int, multiple: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, labels, positions, and the number of each token's example in its row, -1 for padding."""
    longest = max(sum(map(len, row)) for row in rows)
    shape = len(rows), -(-longest // multiple) * multiple
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    positions, owners = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    for index, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row):
            part = slice(start, start + len(example))
            ids[index, part] = torch.tensor(example.input_ids)
            labels[index, part] = torch.tensor(example.labels)
            labels[index, start] = IGNORED
            positions[index, part] = torch.arange(len(example))
            owners[index, part] = number
            start += len(example)
    return ids, labels, positions, owners
