"""The machine as the checks see it, and the probe that runs in a process of its own"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOL_TIMEOUT = 10.0  # seconds; nvidia-smi takes a few where the driver was not loaded yet


@dataclass(frozen=True)
class System:
    """What checks read.

    Attributes:
        environ: the environment that a server would inherit.
        cwd: the directory that it would be started in.
        root: what /proc, /sys and /dev are below.
        timeout: seconds that imports in other processes may take.
    """

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    cwd: Path = field(default_factory=Path.cwd)
    root: Path = Path("/")
    python: str = sys.executable
    timeout: float = 18.0

    def path(self, below_root: str) -> Path:
        return self.root / below_root

    def read(self, below_root: str) -> str | None:
        """The text of a file of the kernel's, None if it does not exist."""
        try:
            return self.path(below_root).read_text().strip()
        except OSError:
            return None

    def tool(self, name: str) -> str | None:
        return shutil.which(name, path=self.environ.get("PATH"))

    def output(self, *command: str, timeout: float = TOOL_TIMEOUT) -> str:
        """What a tool prints.

        Raises:
            OSError: it is not installed, failed or did not end; the message says which.
        """
        tool = self.tool(command[0])
        if tool is None:
            raise OSError(f"{command[0]} is not installed")
        try:
            result = subprocess.run(
                [tool, *command[1:]], env=dict(self.environ), capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise OSError(f"{command[0]} gave no answer in {timeout:.0f} s") from None
        if result.returncode:
            said = (result.stderr.strip() or result.stdout.strip()).splitlines()
            raise OSError(f"{' '.join(command)} failed: {said[-1] if said else f'exit status {result.returncode}'}")
        return result.stdout


MARK = "HUNYUAN-PROBE "  # before each line of JSON, among whatever libraries print


@dataclass
class Probe:
    """What a child process reported.

    Attributes:
        values: of all its JSON lines together.
        failure: why it ended early, with the step it was at; "" if it did not.
    """

    values: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    timed_out: bool = False


def run_probe(system: System) -> Probe:
    """Run `probe_script` with the working directory first on its import path, as it is for a server."""
    script = Path(__file__).with_name("probe_script.py").read_text()
    child = subprocess.Popen(
        [system.python, "-c", script],
        env=dict(system.environ),
        cwd=system.cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its own children end with it
    )
    probe = Probe()
    try:
        output, errors = child.communicate(timeout=system.timeout)
    except subprocess.TimeoutExpired:
        probe.timed_out = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        output, errors = child.communicate()
    for line in output.splitlines():
        if line.startswith(MARK):
            probe.values |= json.loads(line.removeprefix(MARK))
    step = probe.values.pop("step", "start")
    if probe.timed_out:
        probe.failure = f"no answer in {system.timeout:.0f} s, at {step}"
    elif child.returncode:
        said = errors.strip().splitlines()
        cause = f"signal {-child.returncode}" if child.returncode < 0 else said[-1] if said else "no message"
        probe.failure = f"it ended at {step}: {cause}"
    return probe
