"""Imports in processes of their own, where a crash or a hang is an answer too."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hunyuan_vllm.doctor.system import System

__all__ = ["MARK", "Probe", "run_probe"]

MARK = "HUNYUAN-PROBE "  # before each line of JSON, among whatever libraries print


@dataclass
class Probe:
    """What a child process said.

    Attributes:
        values: of all its JSON lines together.
        failure: why it ended before it had said everything, with the step it was at; "" if it did not.
        timed_out: it was ended by us.
    """

    values: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    timed_out: bool = False


def run_probe(system: System, script: Path, cwd: Path) -> Probe:
    """Run a script's text as `python -c`, so that `cwd` comes first on its import path, as it does for `python -m`.

    The script prints `MARK` and a JSON object whenever it knows something; "step" names what it does next.
    """
    child = subprocess.Popen(
        [system.python, "-c", script.read_text()],
        env=dict(system.environ),
        cwd=cwd,
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
