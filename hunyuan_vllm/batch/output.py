"""The output file of a batch: records of results, each input line at most once, one run at a time"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import from_json

from hunyuan_vllm.batch.requests import BadLine, Index, digest, is_batch_api
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import sync
from hunyuan_vllm.util.jsonl import Line

RECORD_START = b'{"line":'
KEPT_FIELDS = ("prompt_logprobs", "prompt_token_ids", "usage")  # of a response, beside its choices


@dataclass(frozen=True)
class Settings:
    """What all answers in one output file have in common; each record repeats it."""

    model: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """A line of the output file."""

    text: bytes
    failed: bool
    tokens: int = 0


def answered(line: Line, settings: Settings, response: BaseModel) -> Record:
    """Record an OpenAI chat completion or completion."""
    body = response.model_dump(mode="json", exclude_none=True)
    answer: dict[str, Any]
    if is_batch_api(line.given):
        answer = {"response": {"status_code": 200, "request_id": body["id"], "body": body}, "error": None}
    else:
        outputs = [_output(choice) for choice in body["choices"]]
        answer = {"outputs": outputs, **{name: body[name] for name in KEPT_FIELDS if name in body}, "error": None}
    return _record(line, settings, answer, failed=False, tokens=body["usage"].get("completion_tokens", 0))


def failed(line: Line, settings: Settings, bad: BadLine) -> Record:
    error = {"message": bad.problem.message, "type": bad.kind, "param": bad.problem.field, "code": bad.code}
    return _record(line, settings, {"error": error}, failed=True)


def _output(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice with its text in front, wherever the API has it."""
    message = choice.pop("message", {})
    message.pop("role", None)
    text = choice.pop("text", None) or message.pop("content", "")
    del choice["index"]
    return {"text": text, **choice, **message}


def _record(line: Line, settings: Settings, answer: dict[str, Any], failed: bool, tokens: int = 0) -> Record:
    content: dict[str, Any] = {"line": line.number}
    if is_batch_api(line.given):
        content |= {"id": f"batch_req_{line.number}", "custom_id": line.id}
    elif line.id is not None:
        content["id"] = line.id
    content |= {"input": line.given, **answer, **asdict(settings)}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"
    return Record(text.encode(), failed, tokens)


@dataclass
class State:
    """How far a run is.

    Attributes:
        pending: at [line number], 1 for a line that is still to be run.
    """

    pending: bytearray
    failed: int = 0


class Output:
    """An output file, open for appending and locked against other runs."""

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
        """Add records and flush them to the disk.

        Raises:
            OSError: not all were written; `resume` removes a record that was cut short.
        """
        _write(self._file, b"".join(record.text for record in records))
        os.fsync(self._file)

    def resume(self, index: Index, settings: Settings, retry_failed: bool = False) -> State:
        """Read what an earlier run wrote, and remove a last record that was cut short.

        Args:
            retry_failed: drop the records that hold an error, so that their lines are run again.
        """
        state = State(bytearray([0]) + bytearray(1 if digest else 0 for digest in index.digests))
        beside = self._path.with_name(f".{self._path.name}.retry")  # takes the file's place, without the errors
        kept = _locked(beside) if retry_failed else None
        try:
            if kept is not None:
                os.ftruncate(kept, 0)  # it is there if an earlier run was killed
            size = 0
            for number, text in enumerate(self._complete_lines(), start=1):
                size += len(text)
                record = _parsed(self._path, number, text)
                line, is_failed = record["line"], record.get("error") is not None
                if is_failed and kept is not None:
                    continue
                self._check(record, index, settings)
                if not state.pending[line]:
                    raise UserError(f"{self._path} holds line {line} twice: remove one of the two")
                state.pending[line] = 0
                state.failed += is_failed
                if kept is not None:
                    _write(kept, text)
            if kept is None:
                os.ftruncate(self._file, size)
                return state
            os.fchmod(kept, os.fstat(self._file).st_mode & 0o777)
            os.fsync(kept)
            beside.rename(self._path)
            sync(self._path.parent)
        except BaseException:
            if kept is not None:
                beside.unlink(missing_ok=True)
                os.close(kept)
            raise
        os.close(self._file)
        self._file = kept
        return state

    def _complete_lines(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            for text in file:
                if text.endswith(b"\n"):
                    yield text
                elif not _may_be_cut_short(text):
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


def _may_be_cut_short(text: bytes) -> bool:
    """Whether this can be the start of a record, perhaps followed by zeros, which a power failure leaves."""
    text = text.rstrip(b"\0")
    return text.startswith(RECORD_START[: len(text)])


def _parsed(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        record = from_json(text)
    except ValueError:
        raise _foreign(path, f"line {number}") from None
    line = record.get("line") if isinstance(record, dict) and "input" in record else None
    if not isinstance(line, int) or line < 1:
        raise _foreign(path, f"line {number}")
    return record


def _foreign(path: Path, where: str) -> UserError:
    return UserError(f"{path} is not the output of a batch run ({where} is not a record): name another output file")
