"""What was measured, on what, as a file that other runs are compared with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hunyuan_vllm.bench.workload import Point
from hunyuan_vllm.errors import UserError

__all__ = ["PERCENTILES", "Measured", "Run", "Times", "read_run", "write_beside"]

PERCENTILES = (50, 90, 99)


class Times(BaseModel):
    """Milliseconds: the mean and percentiles over requests, or over tokens."""

    mean: float
    p50: float
    p90: float
    p99: float


class Measured(BaseModel):
    """A point and what came of it.

    Attributes:
        failed: requests that were not answered; they count in nothing else.
        seconds: from the first request to the last answer.
        ttft: time to first token.
        tpot: time per output token after the first, one value a request.
        itl: time between two tokens, one value a token.
        e2e: time to the whole answer.
    """

    concurrency: int | None
    rate: float | None
    input_len: int
    output_len: int
    requests: int
    failed: int
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    ttft: Times
    tpot: Times
    itl: Times
    e2e: Times

    @property
    def point(self) -> Point:
        return Point(self.concurrency, self.rate, self.input_len, self.output_len, self.requests)


class Run(BaseModel):
    """All points of one run.

    Attributes:
        date: its start, UTC, ISO 8601.
        client: what asked: versions, and whether it ran on the server's machine.
        machine: what the server runs on; empty if it does not say.
        options: how it is set up, with its versions.
        seed: of the prompts.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    date: str
    model: str
    client: dict[str, str]
    machine: dict[str, str]
    options: dict[str, str]
    seed: int
    points: list[Measured]

    def save(self, path: Path) -> None:
        """Raises:
        UserError: it cannot be written.
        """
        write_beside(path, self.model_dump_json(indent=1).encode() + b"\n")


def read_run(path: Path) -> Run:
    """The run in a file.

    Raises:
        UserError: it is not there, or no run.
    """
    try:
        return Run.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        problem = f"{where}: {first['msg']}" if where else first["msg"]
        raise UserError(f"{path} is not what `hunyuan-vllm bench --output` writes ({problem})") from None


def write_beside(path: Path, content: bytes) -> None:
    """Whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
