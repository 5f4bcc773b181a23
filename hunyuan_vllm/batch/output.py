"""The output file: whole lines, each input line at most once, whatever ends the run; and one run at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from hunyuan_vllm.batch.lines import Index, digest
from hunyuan_vllm.batch.requests import Record, Settings
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import sync

__all__ = ["Output", "State"]

RECORD_START = b'{"line":'


@dataclass
class State:
    """How far a run is.

    Attributes:
        pending: at [line number], 1 for a line that is still to be run.
        failed: records in the file that hold an error.
    """

    pending: bytearray
    failed: int = 0


class Output:
    """An output file, open for appending and locked against other runs.

    Raises:
        UserError: it cannot be written, or another run is writing it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = _locked(path)
        except BlockingIOError:
            raise UserError(f"another run is writing {path}: wait for it, or name another output file") from None
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        os.close(self._file)

    def append(self, records: Iterable[Record]) -> None:
        """Add records; on return they are on the disk.

        Raises:
            OSError: they are not, or not all; a line cut short is removed when the file is opened the next time.
        """
        _write(self._file, b"".join(record.text for record in records))
        os.fsync(self._file)

    def resume(self, index: Index, settings: Settings, retry_failed: bool = False) -> State:
        """Read what an earlier run left, and remove a last line that it did not finish.

        Args:
            index: the input file's.
            retry_failed: drop the records that hold an error, so that their lines are run again.

        Raises:
            UserError: the file is not the output of this input under these settings.
        """
        state = State(bytearray([0]) + bytearray(1 if digest else 0 for digest in index.digests))
        kept = 0
        for number, text in enumerate(self._complete_lines(), start=1):
            kept += len(text)
            record = _parsed(self._path, number, text)
            line, is_failed = record["line"], record.get("error") is not None
            if not (is_failed and retry_failed):
                self._check(record, index, settings)
                if not state.pending[line]:
                    raise UserError(f"{self._path} holds line {line} twice: remove one of the two")
                state.pending[line] = 0
            state.failed += is_failed
        os.ftruncate(self._file, kept)
        if retry_failed and state.failed:
            self._drop_failed()
            state.failed = 0
        return state

    def _complete_lines(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            for text in file:
                if text.endswith(b"\n"):
                    yield text
                elif not _may_be_torn(text):
                    raise _foreign(self._path, "its last line")

    def _check(self, record: dict[str, Any], index: Index, settings: Settings) -> None:
        line = record["line"]
        if line > len(index.digests) or digest(record["input"]) != index.digests[line - 1]:
            remedy = "run it with --retry-failed" if record.get("error") else "undo that, or name another output file"
            raise UserError(f"line {line} of the input has changed since {self._path} was written: {remedy}")
        for name, value in asdict(settings).items():
            if record.get(name) != value:
                raise UserError(
                    f"{self._path} was written with {name} {record.get(name)}, this run has {value}: "
                    "use the same, or name another output file"
                )

    def _drop_failed(self) -> None:
        """Replace the file by one without the records that hold an error; the lock passes over with it."""
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        new = _locked(beside)
        try:
            for number, text in enumerate(self._complete_lines(), start=1):
                if _parsed(self._path, number, text).get("error") is None:
                    _write(new, text)
            os.fchmod(new, os.fstat(self._file).st_mode & 0o777)
            os.fsync(new)
            beside.rename(self._path)
            sync(self._path.parent)
        except BaseException:
            beside.unlink(missing_ok=True)
            os.close(new)
            raise
        os.close(self._file)
        self._file = new


def _locked(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # another run replaced the file in between


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _may_be_torn(text: bytes) -> bool:
    """Whether this can be the beginning of a record; after a power failure, with zeros for the rest."""
    text = text.rstrip(b"\0")
    return text.startswith(RECORD_START[: len(text)])


def _parsed(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        record = from_json(text)
    except ValueError:
        raise _foreign(path, f"line {number}") from None
    if not isinstance(record, dict) or "input" not in record or not isinstance(line := record.get("line"), int):
        raise _foreign(path, f"line {number}")
    if line < 1:
        raise _foreign(path, f"line {number}")
    return record


def _foreign(path: Path, where: str) -> UserError:
    return UserError(f"{path} is not the output of a batch run ({where} is no such record): name another output file")
