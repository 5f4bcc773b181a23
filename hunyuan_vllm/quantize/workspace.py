"""The folder a conversion works in, beside its target: what is finished in it survives any end of the run.

DST.partial/checkpoint/   becomes DST by one rename
DST.partial/state/        options, lock, calibration, report of each file
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.quantize.progress import gigabytes
from hunyuan_vllm.quantize.shards import Shard
from hunyuan_vllm.util.files import sync

__all__ = ["Workspace"]

RUN = "run.json"


class Workspace:
    """A context manager that makes or takes up DST.partial, locked against other runs.

    Args:
        target: DST.
        record: what the run does; a run that takes up the folder must have the same.

    Raises:
        UserError: DST exists, another run is writing it, or DST.partial was begun with other options.
    """

    def __init__(self, target: Path, record: Mapping[str, Any]) -> None:
        if target.exists() or target.is_symlink():
            raise UserError(f"{target} exists: name a folder that does not, or remove it first")
        if not target.parent.is_dir():
            raise UserError(f"{target.parent} does not exist: make the folder that {target.name} is to be in")
        self.target = target
        self.folder = target.with_name(f"{target.name}.partial")
        self.checkpoint, self.state = self.folder / "checkpoint", self.folder / "state"
        self.resumed = (self.state / RUN).exists()
        if self.folder.exists() and not self.state.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} exists and holds no unfinished conversion: remove it first")
        try:
            self.checkpoint.mkdir(parents=True, exist_ok=True)
            self.state.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror}") from None
        self._lock = os.open(self.state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._same_run(dict(record))
            for unfinished in (*self.checkpoint.glob(".*.partial"), *self.state.glob(".*.partial")):
                unfinished.unlink()
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"another run is writing {target}: wait for it, or name another folder") from None
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def unwritten(self, shards: Iterable[Shard]) -> list[Shard]:
        """Those that this run has yet to write."""
        return [shard for shard in shards if not (self.checkpoint / shard.file).exists()]

    def need_room(self, nbytes: int, what: str, target: str) -> None:
        """Look whether the disk has this much more room.

        Args:
            what: needs it, for the message.
            target: how the user names the folder that is written.

        Raises:
            UserError: it has not.
        """
        free = shutil.disk_usage(self.folder).free
        if free < nbytes:
            raise UserError(
                f"{self.folder.parent} has {gigabytes(free)} free, {what} needs {gigabytes(nbytes)} more: "
                f"make room, or name {target} on another disk"
            )

    def write_json(self, file: Path, value: Any) -> None:
        """Write beside, then rename: the file is never there in part."""
        partial = self.beside(file)
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.put(partial, file)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under `name` in the state folder; contiguous copies, since a file holds no views."""
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

    def copy(self, source: Path, file: Path) -> None:
        """Copy a small file."""
        partial = self.beside(file)
        shutil.copyfile(source, partial)
        self.put(partial, file)

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
            raise UserError(f"{self.target} has appeared meanwhile: the finished checkpoint is in {self.checkpoint}")
        sync(self.checkpoint)
        os.replace(self.checkpoint, self.target)
        sync(self.target.parent)
        shutil.rmtree(self.folder)

    def _same_run(self, record: dict[str, Any]) -> None:
        file = self.state / RUN
        if not file.exists():
            self.write_json(file, record)
            return
        begun = json.loads(file.read_text())
        for name, value in record.items():
            if begun.get(name) != value:
                raise UserError(
                    f"{self.folder} was begun with {name} {begun.get(name)}, this run has {value}: "
                    "use the same, or remove the folder to begin again"
                )
