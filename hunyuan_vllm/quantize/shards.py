"""The files that are written: which tensor lies where, known before any is made, and a writer that needs no file in
memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from hunyuan_vllm.quantize.schemes import Spec
from hunyuan_vllm.quantize.units import Unit

__all__ = ["Shard", "ShardWriter", "index_of", "plan_shards"]

# How safetensors writes torch's types.
TYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Shard:
    """A file and the units it holds, whole."""

    file: str
    units: tuple[Unit, ...]
    specs: tuple[Spec, ...]

    @property
    def nbytes(self) -> int:
        return sum(size_of(spec) for spec in self.specs)


def plan_shards(units: Iterable[tuple[Unit, Sequence[Spec]]], shard_bytes: int) -> list[Shard]:
    """Deal units out to files of at most `shard_bytes` of tensors; a larger unit gets a file of its own."""
    groups: list[tuple[list[Unit], list[Spec]]] = []
    room = 0
    for unit, specs in units:
        size = sum(size_of(spec) for spec in specs)
        if size > room:
            groups.append(([], []))
            room = shard_bytes
        groups[-1][0].append(unit)
        groups[-1][1].extend(specs)
        room -= size
    count = len(groups)
    names = ["model.safetensors"]
    if count > 1:
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return [Shard(name, tuple(held), tuple(specs)) for name, (held, specs) in zip(names, groups, strict=True)]


def index_of(shards: Sequence[Shard]) -> dict[str, object]:
    """The contents of model.safetensors.index.json."""
    weight_map = {spec.name: shard.file for shard in shards for spec in shard.specs}
    return {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": dict(sorted(weight_map.items())),
    }


def size_of(spec: Spec) -> int:
    """Bytes."""
    return math.prod(spec.shape) * spec.dtype.itemsize


class ShardWriter:
    """A safetensors file whose tensors are written one at a time, in any order, to their places.

    The header comes first, so all specs are known. Wide types lie in front, which keeps every tensor aligned.

    Raises:
        OSError: the disk has no room for the file.
    """

    def __init__(self, path: Path, specs: Sequence[Spec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        offsets: dict[str, int] = {}
        for spec in sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name)):
            offsets[spec.name] = offset
            end = offset + size_of(spec)
            header[spec.name] = {
                "dtype": TYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]
            }  # fmt: skip
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._specs = {spec.name: spec for spec in specs}
        self._starts = {name: 8 + len(text) + offset for name, offset in offsets.items()}
        self._file = path.open("wb", buffering=0)
        os.posix_fallocate(self._file.fileno(), 0, 8 + len(text) + offset)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor of exactly the planned type and shape to its place."""
        spec = self._specs.pop(name)
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, planned {spec.dtype} {list(spec.shape)}")
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._file.seek(self._starts[name])
        while data:
            data = data[self._file.write(data) :]

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._specs:
                    raise ValueError(f"{len(self._specs)} planned tensors were not written, {min(self._specs)} first")
                os.fsync(self._file.fileno())
                # What is read back must come from the disk, not from the memory it was written from.
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            self._file.close()
