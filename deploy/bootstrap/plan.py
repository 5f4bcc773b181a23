"""What the environment must hold on this machine: device, Python, lock files, and the keys that tell it is current."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bootstrap.errors import SetupError

__all__ = ["ENGINE_SIZE", "FORMAT", "KINDS", "PYTHONS", "Plan", "choose_device"]

# Bytes, about: what the lock of each device downloads and takes on disk, without the CPU's torch.
ENGINE_SIZE = {"cpu": (0.24e9, 1.0e9), "cuda": (4.0e9, 10.0e9)}
KINDS = {"cpu": "the CPU", "cuda": "NVIDIA GPUs"}
DEVICE_VARIABLE = "HUNYUAN_DEVICE"
FORMAT = 1  # raise it to have every existing environment made anew
PYTHONS = ((3, 11), (3, 14))  # oldest and newest the pinned engine supports


def choose_device(environ: Mapping[str, str]) -> str:
    """ "cpu" or "cuda": HUNYUAN_DEVICE if set, else whether `nvidia-smi -L` lists a GPU.

    Raises:
        SetupError: HUNYUAN_DEVICE is something else.
    """
    wanted = environ.get(DEVICE_VARIABLE, "").strip().lower()
    if wanted in ("cpu", "cuda"):
        return wanted
    if wanted:
        raise SetupError(f"{DEVICE_VARIABLE}={wanted} is not known: use cpu or cuda")
    tool = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if tool is None:
        return "cpu"
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if "GPU " in listing else "cpu"


@dataclass(frozen=True)
class Plan:
    """Everything decided before anything is touched.

    Attributes:
        device: "cpu" or "cuda".
        device_named: somebody said which, rather than nvidia-smi.
    """

    root: Path
    venv: Path
    device: str
    device_named: bool
    python: tuple[int, int]
    with_tests: bool
    with_training: bool

    @classmethod
    def make(
        cls, root: Path, environ: Mapping[str, str], with_tests: bool = False, with_training: bool = False
    ) -> Plan:
        """The plan for a checkout at `root`. The tests' tools include those of fine-tuning.

        Raises:
            SetupError: a variable has a value that means nothing, or this Python is too new.
        """
        python = sys.version_info[:2]
        if not PYTHONS[0] <= python <= PYTHONS[1]:
            span = " to ".join(f"{major}.{minor}" for major, minor in PYTHONS)
            raise SetupError(f"Python {python[0]}.{python[1]} is not supported yet: name one of {span} with PYTHON=")
        venv = Path(environ.get("HUNYUAN_VENV") or root / ".venv").absolute()
        named = bool(environ.get(DEVICE_VARIABLE, "").strip())
        return cls(root, venv, choose_device(environ), named, python, with_tests, with_tests or with_training)

    @property
    def requirements(self) -> Path:
        return self.root / "requirements"

    @property
    def engine_locks(self) -> list[Path]:
        """The lock of the engine; on the CPU torch comes beside it, from where it is found."""
        return [self.requirements / f"{self.device}.txt"]

    @property
    def train_lock(self) -> Path:
        return self.requirements / "train.txt"

    @property
    def test_lock(self) -> Path:
        return self.requirements / "test.txt"

    def wanted(self) -> dict[str, str]:
        """Each part the environment must have, with the key of the contents it must have been made from."""
        torch_locks = sorted(self.requirements.glob("torch-*.txt")) if self.device == "cpu" else []
        python = "{}.{}".format(*self.python)
        parts = {
            "engine": _key([str(FORMAT), self.device, python, str(self.venv)], self.engine_locks + torch_locks),
            "package": _key([str(self.root)], [self.root / "pyproject.toml"]),
        }
        if self.with_training:
            parts["train"] = _key([], [self.train_lock])
        if self.with_tests:
            parts["test"] = _key([], [self.test_lock, self.train_lock])
        return parts


def _key(words: list[str], files: list[Path]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for file in files:
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            raise SetupError(f"the checkout is incomplete: {file}: {error.strerror}") from None
    return digest.hexdigest()
