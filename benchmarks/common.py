"""Options, interleaved runs, medians with their range, the machine, tables and JSON, for all benchmarks.

A figure is the median (min–max) over rounds. What is compared runs interleaved, A B B A; ratios are taken within a
round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import runpy
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

K, T = TypeVar("K"), TypeVar("T")
REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hunyuan-vllm"
# Variables that change what is measured; the report shows those that are set.
MEASURED_VARIABLES = ("HUNYUAN_VLLM_", "VLLM_CPU_", "OMP_", "GOMP_", "KMP_", "THP_", "MALLOC_", "LD_PRELOAD", "ONEDNN_")

console = Console(highlight=False, soft_wrap=True, markup=False)
if not console.is_terminal:
    console.width = 160  # a file or a pipe has no width
_begin = time.perf_counter()


def note(message: str) -> None:
    """Print the current stage, with the seconds since the start."""
    console.print(f"{time.perf_counter() - _begin:5.0f} s  {message}", style="dim")


def cores() -> list[int]:
    """One CPU of each physical core that this process may use, as vLLM picks them."""
    first: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        first.setdefault(siblings.read_text() if siblings.exists() else str(cpu), cpu)
    return list(first.values())


def options(doc: str | None, rounds: int | None, threads: bool = True) -> argparse.ArgumentParser:
    """A parser with the common options; `rounds` is the default of --rounds, None for no such option."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument(
            "--rounds",
            type=_positive,
            default=rounds,
            help="preferably even (default: %(default)s)",
        )
    if threads:
        most = len(cores())
        parser.add_argument(
            "--threads", type=_positive, default=most, help="OpenMP threads (default: all cores, %(default)s)"
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def interleaved(contestants: dict[K, Callable[[], T]], rounds: int, notes: bool = True) -> dict[K, list[T]]:
    """Run every contestant once per round, in an order that reverses each time. Returns their results by round."""
    results: dict[K, list[T]] = {name: [] for name in contestants}
    order = list(contestants)
    for number in range(rounds):
        for name in order:
            if notes:
                note(f"round {number + 1} of {rounds}: {name}")
            results[name].append(contestants[name]())
        order.reverse()
    return results


@dataclass(frozen=True)
class Spread:
    """A median and the range it comes from."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        known = list(values)
        return cls(statistics.median(known), min(known), max(known))

    def __str__(self) -> str:
        return f"{figure(self.median)} ({figure(self.min)}–{figure(self.max)})"


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Spread of the ratios taken round by round."""
    return Spread.of(above / below for above, below in zip(numerators, denominators, strict=True))


def figure(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Report:
    """Rows of one or more tables, with the machine they come from: printed, and written as JSON with --json.

    A cell is a `Spread`, a number or text; numbers stay numbers in the JSON.
    """

    def __init__(self, benchmark: str, arguments: argparse.Namespace, **facts: Any) -> None:
        given = {name: str(v) if isinstance(v, Path) else v for name, v in vars(arguments).items() if name != "json"}
        self._file: Path | None = arguments.json
        if self._file is not None and not self._file.parent.is_dir():
            raise SystemExit(f"--json {self._file}: {self._file.parent} does not exist")
        self._record: dict[str, Any] = {"benchmark": benchmark, "settings": given, "machine": machine(), **facts}
        self._tables: dict[str, list[dict[str, Any]]] = {}

    def add(self, table: str, **cells: Any) -> None:
        self._tables.setdefault(table, []).append(cells)

    def fact(self, **facts: Any) -> None:
        """Add to what the JSON says beside the tables."""
        self._record |= facts

    def show(self) -> None:
        """Print the tables and write the file."""
        described, settings = self._record["machine"], self._record["settings"]
        console.print(
            f"\n{described['cpu']}, {described['cores']} cores, "
            + (f"--threads {settings['threads']}, " if "threads" in settings else "")
            + f"{described['memory_gib']:.0f} GiB; vLLM {described['vllm']}, torch {described['torch']}, "
            f"Python {described['python']}"
            + (f"; median (min–max) of {settings['rounds']} rounds" if "rounds" in settings else "")
        )
        if described["environment"]:
            console.print(" ".join(f"{name}={value}" for name, value in described["environment"].items()))
        for title, rows in self._tables.items():
            table = Table(title=title, title_justify="left")
            for position, name in enumerate(rows[0]):
                table.add_column(name.replace("_", " "), justify="right" if position else "left", no_wrap=True)
            for row in rows:
                table.add_row(*(figure(cell) if isinstance(cell, float) else str(cell) for cell in row.values()))
            console.print(table)
        if self._file is not None:
            self._write(self._file)

    def _write(self, file: Path) -> None:
        text = json.dumps(self._record | {"tables": self._tables}, indent=1, default=asdict)
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(text + "\n")
        partial.replace(file)
        note(f"written to {file}")


def machine() -> dict[str, Any]:
    """This machine and the software that is measured."""
    info = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in info.items()}
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name", platform.machine()),
        "cores": len(cores()),
        "instructions": sorted(flags & {"avx2", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"}),
        "memory_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        "load_at_start": os.getloadavg()[0],
        "vllm": _version("vllm-cpu") or _version("vllm"),
        "torch": _version("torch"),
        "python": platform.python_version(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(MEASURED_VARIABLES)},
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


MODELS = {
    "1.1b": ("bench-mid", "mid_config", {}),
    "moe": ("bench-v1-moe", "v1_moe_config", {}),
    "dense": ("bench-v1-dense", "v1_dense_config", {}),
    "hunyuan-0.5b": ("bench-0.5b", "published_config", {"name": "hunyuan-0.5b"}),
    "hunyuan-1.8b": ("bench-1.8b", "published_config", {"name": "hunyuan-1.8b"}),
}
"""Directory, configuration in tests/checkpoints.py and its arguments. The last two have the published shapes."""


def checkpoint_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=CACHE / MODELS["1.1b"][0],
        help="1.1 billion random parameters, 2.2 GB, written on first use (default: %(default)s)",
    )


def mid_checkpoint(directory: Path) -> Path:
    """The checkpoint of 1.1 billion parameters in `directory`, written on first use."""
    return kept_checkpoint("1.1b", directory)


def kept_checkpoint(model: str, directory: Path | None = None) -> Path:
    """A random checkpoint of a shape in `MODELS`, written on first use."""
    kept_in, shape, arguments = MODELS[model]
    directory = directory or CACHE / kept_in
    if (directory / "config.json").exists():
        return directory
    if directory.exists():
        raise SystemExit(f"{directory} exists but holds no checkpoint: remove it or name another directory")
    note(f"writing random weights to {directory}")
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    random_checkpoint(partial, shape, **arguments)
    partial.rename(directory)
    return directory


def random_checkpoint(directory: Path, shape: str, seed: int = 0, **overrides: Any) -> Path:
    """Write a random checkpoint with one of the configurations that tests/checkpoints.py has."""
    maker = runpy.run_path(str(REPOSITORY / "tests" / "checkpoints.py"))
    maker["write_checkpoint"](directory, maker[shape](**overrides), seed=seed)
    return directory
