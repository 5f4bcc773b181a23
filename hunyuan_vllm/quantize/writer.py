"""Shards of the converted checkpoint, written so that an interrupted run resumes"""

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hunyuan_vllm.checkpoint import INDEX_FILE
from hunyuan_vllm.quantize.formats import Spec
from hunyuan_vllm.quantize.source import Source, Unit
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import sync
from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import gigabytes

# How safetensors writes torch's types.
TYPE_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


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
    return math.prod(spec.shape) * spec.dtype.itemsize


class ShardWriter:
    """A safetensors file whose tensors are written one at a time, in any order, to their places.

    The header comes first, so all specs are known. Wide types lie in front, which keeps every tensor aligned.
    """

    def __init__(self, path: Path, specs: Sequence[Spec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        offsets: dict[str, int] = {}
        for spec in sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name)):
            start, offset = offset, offset + size_of(spec)
            offsets[spec.name] = start
            kind, shape = TYPE_NAMES[spec.dtype], list(spec.shape)
            header[spec.name] = {"dtype": kind, "shape": shape, "data_offsets": [start, offset]}
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                if self._specs:
                    raise ValueError(f"{len(self._specs)} planned tensors were not written, {min(self._specs)} first")
                os.fsync(self._file.fileno())
                # What is read back must come from the disk, not from the memory it was written from.
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            self._file.close()


REMEDY = "the disk or the memory is at fault; run the same command again"


@contextmanager
def reading_back(file: Path, shard: Shard, device: str = "cpu") -> Iterator[safe_open]:
    """A file that has just been written, opened; it must hold the planned tensors."""
    try:
        with safe_open(file, framework="pt", device=device) as tensors:
            if set(tensors.keys()) != {spec.name for spec in shard.specs}:
                raise UserError(f"{file} reads back with other tensors than were written: {REMEDY}")
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read back ({error}): {REMEDY}") from None


def check_bits(file: Path, name: str, found: Tensor, wanted: Tensor) -> None:
    """Raise UserError unless a tensor reads back as it was written, bit by bit: a zero's sign counts."""
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, wanted)]
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape) or not torch.equal(*bits):
        raise UserError(f"{file}: {name} reads back differently: {REMEDY}")


RUN = "run.json"


class Workspace:
    """A context manager that makes or takes up DST.partial, locked against other runs.

    Args:
        record: what the run does; a run that takes up the directory must have the same.
    """

    def __init__(self, target: Path, record: Mapping[str, Any]) -> None:
        if target.exists() or target.is_symlink():
            raise UserError(f"{target} exists: name a directory that does not, or remove it first")
        if not target.parent.is_dir():
            raise UserError(f"{target.parent} does not exist: make the directory that {target.name} belongs in")
        self.target = target
        self.directory = target.with_name(f"{target.name}.partial")
        self.checkpoint, self.state = self.directory / "checkpoint", self.directory / "state"
        self.resumed = (self.state / RUN).exists()
        if self.directory.exists() and not self.state.exists() and any(self.directory.iterdir()):
            raise UserError(f"{self.directory} exists and holds no unfinished conversion: remove it first")
        try:
            self.checkpoint.mkdir(parents=True, exist_ok=True)
            self.state.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.directory} cannot be written: {error.strerror}") from None
        self._lock = os.open(self.state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._same_run(dict(record))
            for unfinished in (*self.checkpoint.glob(".*.partial"), *self.state.glob(".*.partial")):
                unfinished.unlink()
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"another run is writing {target}: wait for it, or name another directory") from None
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def unwritten(self, shards: Iterable[Shard]) -> list[Shard]:
        """Those that this run has yet to write."""
        return [shard for shard in shards if not (self.checkpoint / shard.file).exists()]

    def need_room(self, source: Source, shards: Sequence[Shard], more: int, what: str, target: str) -> None:
        """Look whether the disk has room for the unwritten shards, the source's other files, and `more` bytes.

        Args:
            what: needs it, for the message.
            target: how the user names the directory that is written.
        """
        needed = more + sum(shard.nbytes for shard in self.unwritten(shards))
        needed += sum(file.stat().st_size for file in source.other_files())
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise UserError(
                f"{self.directory.parent} has {gigabytes(free)} free, {what} needs {gigabytes(needed)} more: "
                f"make room, or name {target} on another disk"
            )

    def write_checkpoint(
        self,
        source: Source,
        shards: Sequence[Shard],
        encode: Callable[[Unit], Iterable[tuple[str, Tensor]]],
        verify: Callable[[Path, Shard, Callable[[Unit], None]], None],
        progress: Progress,
        stage: str,
    ) -> None:
        """Write the shards that are missing, the source's other files, and the index.

        Args:
            encode: the tensors (name, tensor) of a unit, as the shard's specs say.
            verify: reads a shard back before it is renamed, and tells its last argument of each unit.
            stage: what is going on, for the progress.
        """

        def size(units: Iterable[Unit]) -> int:
            return sum(source.nbytes(name) for unit in units for name in unit.names)

        def verified(unit: Unit) -> None:
            progress.advance(size([unit]) - size([unit]) // 2)

        left = self.unwritten(shards)
        total = sum(size(shard.units) for shard in shards)
        with progress.stage(stage, total, total - sum(size(shard.units) for shard in left)):
            for shard in left:
                file = self.checkpoint / shard.file
                with ShardWriter(self.beside(file), shard.specs) as writer:
                    for unit in shard.units:
                        for name, tensor in encode(unit):
                            writer.write(name, tensor)
                        progress.advance(size([unit]) // 2)
                verify(self.beside(file), shard, verified)
                self.put(self.beside(file), file)
        for file in source.other_files():
            shutil.copyfile(file, self.beside(self.checkpoint / file.name))
            self.put(self.beside(self.checkpoint / file.name), self.checkpoint / file.name)
        if len(shards) > 1:
            self.write_json(self.checkpoint / INDEX_FILE, index_of(shards))

    def write_json(self, file: Path, value: Any) -> None:
        """Write beside, then rename: the file is never there in part."""
        partial = self.beside(file)
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.put(partial, file)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under `name` in the state directory; contiguous copies, since a file holds no views."""
        file = self.state / f"{name}.safetensors"
        partial = self.beside(file)
        try:
            save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, partial)
        except SafetensorError as error:  # the library's word for what the disk did not take
            raise OSError(errno.EIO, str(error)) from None
        self.put(partial, file)

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """What `write_tensors` kept; None if nothing."""
        file = self.state / f"{name}.safetensors"
        return load_file(file) if file.exists() else None

    def state_bytes(self) -> int:
        """Bytes of calibration that are on the disk."""
        return sum(file.stat().st_size for file in self.state.glob("*.safetensors"))

    @staticmethod
    def beside(file: Path) -> Path:
        """Where `file` is made, before `put` gives it its name."""
        return file.with_name(f".{file.name}.partial")

    def put(self, partial: Path, file: Path) -> None:
        """Rename a whole file to its name once its bytes are on the disk."""
        sync(partial)
        os.replace(partial, file)
        sync(file.parent)

    def finish(self) -> None:
        """Make the checkpoint the target, and remove the rest."""
        if self.target.exists():
            raise UserError(f"{self.target} was created meanwhile: the finished checkpoint is in {self.checkpoint}")
        sync(self.checkpoint)
        os.replace(self.checkpoint, self.target)
        sync(self.target.parent)
        shutil.rmtree(self.directory)

    def _same_run(self, record: dict[str, Any]) -> None:
        file = self.state / RUN
        if not file.exists():
            self.write_json(file, record)
            return
        begun = json.loads(file.read_text())
        for name, value in record.items():
            if begun.get(name) != value:
                raise UserError(
                    f"{self.directory} was started with {name} {begun.get(name)}, this run has {value}: "
                    "use the same, or remove the directory to start over"
                )
