"""How a process of a run ends once it has done its work: without Python's teardown."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

__all__ = ["end_process"]


def end_process(status: int) -> NoReturn:
    """End with this status, after what was registered for the end.

    The threads of PyTorch's process groups outlive the groups (DistributedDataParallel keeps them), and one that needs
    Python while that is being taken apart aborts the process: status 134 of a run that had succeeded.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
