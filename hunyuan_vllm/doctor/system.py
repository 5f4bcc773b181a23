"""The machine as checks see it: its environment, its files and its tools, through one object that a test can fake."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["System"]

TOOL_TIMEOUT = 10.0  # seconds; nvidia-smi takes a few where the driver was not loaded yet


@dataclass(frozen=True)
class System:
    """Where checks look.

    Attributes:
        environ: the environment that a server would inherit.
        cwd: the folder that it would be started in.
        root: what /proc, /sys and /dev are below.
        python: the interpreter it would run on.
        timeout: seconds that imports in other processes may take.
    """

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    cwd: Path = field(default_factory=Path.cwd)
    root: Path = Path("/")
    python: str = sys.executable
    timeout: float = 18.0

    @property
    def among_several(self) -> bool:
        """Whether the environment speaks of several nodes, where clocks and names count."""
        return bool(self.environ.get("LOCAL_IP") or self.environ.get("RAY_ADDRESS"))

    def path(self, below_root: str) -> Path:
        return self.root / below_root

    def read(self, below_root: str) -> str | None:
        """The text of a file of the kernel's, None where it is not there."""
        try:
            return self.path(below_root).read_text().strip()
        except OSError:
            return None

    def tool(self, name: str) -> str | None:
        return shutil.which(name, path=self.environ.get("PATH"))

    def output(self, *command: str) -> str:
        """What a tool prints.

        Raises:
            OSError: it is not there, failed or did not end; the message says so.
        """
        tool = self.tool(command[0])
        if tool is None:
            raise OSError(f"{command[0]} is not there")
        try:
            result = subprocess.run(
                [tool, *command[1:]], env=dict(self.environ), capture_output=True, text=True, timeout=TOOL_TIMEOUT
            )
        except subprocess.TimeoutExpired:
            raise OSError(f"{command[0]} gave no answer in {TOOL_TIMEOUT:.0f} s") from None
        if result.returncode:
            said = (result.stderr.strip() or result.stdout.strip()).splitlines()
            raise OSError(f"{' '.join(command)} failed: {said[-1] if said else f'exit status {result.returncode}'}")
        return result.stdout
