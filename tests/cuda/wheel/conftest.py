"""vLLM's CUDA wheel on a machine without a GPU: see tests/cuda.sh, which runs this directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# Triton's kernels run on the CPU, interpreted. All of this is read while vLLM and triton are imported.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "VLLM_DISABLE_SHARED_EXPERTS_STREAM": "1"}

import pytest  # noqa: E402
from fake_cuda import cuda_platform  # noqa: E402
from vllm import platforms  # noqa: E402

# Before any module of vLLM asks which platform it is on.
if platforms._current_platform is None:
    platforms._current_platform = cuda_platform(9, 0)()

_rows = pytest.StashKey[list[tuple[Any, ...]]]()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Adds a row to the table at the end of the run."""
    rows = request.config.stash.setdefault(_rows, [])
    return lambda *cells: rows.append(cells)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(_rows, [])
    if not rows:
        return
    from rich.console import Console
    from rich.table import Table

    printed = Table("network", "scheme", "GPU", "ranks", "linear layers", "experts", "attention", title="Kernels")
    for row in rows:
        printed.add_row(*map(str, row))
    Console(width=150).print(printed)
