"""What the machine must offer before an installation is worth starting."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import shutil
from pathlib import Path

from bootstrap.errors import SetupError

__all__ = ["check_disk", "check_machine", "gigabytes"]


def gigabytes(size: float) -> str:
    """A size in bytes, in words."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def check_machine(device: str) -> None:
    """Raises SetupError naming the first thing that is missing and the package that brings it."""
    if platform.system() != "Linux":
        raise SetupError(f"the server runs on Linux; this is {platform.system()}")
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            "this Python cannot make virtual environments: install its venv package (Debian, Ubuntu: apt-get install "
            "python3-venv), or name another Python with PYTHON="
        )
    if device == "cpu":
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError:
            raise SetupError(
                "libnuma.so.1 is missing, which the CPU engine needs: apt-get install libnuma1 (Debian, Ubuntu) or "
                "dnf install numactl-libs (Fedora, RHEL)"
            ) from None


def check_disk(folder: Path, needed: float) -> None:
    """Raises SetupError if the file system of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(
            f"{folder} has {gigabytes(free)} free and the environment needs {gigabytes(needed)}: make room, or choose "
            "another place with HUNYUAN_VENV="
        )
