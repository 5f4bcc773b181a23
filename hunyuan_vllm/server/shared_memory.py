"""Shared memory of a server: its workers under Ray make some, which nobody frees when they are killed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["mapped_shared_memory"]

PREFIX = "/dev/shm/psm_"  # Python's name for multiprocessing's


def mapped_shared_memory(processes: Iterable[psutil.Process]) -> set[Path]:
    """The blocks that these processes use, whoever made them."""
    found: set[Path] = set()
    for process in processes:
        with suppress(psutil.Error, OSError):
            found |= {Path(one.path) for one in process.memory_maps() if one.path.startswith(PREFIX)}
    return found
