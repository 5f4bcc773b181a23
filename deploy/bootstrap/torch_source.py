"""Which torch a CPU machine gets: the CPU build where it is within reach, else the index's own with CUDA libraries.

The CPU build is not on PyPI. No address is built in: only pip's configuration and the user name sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bootstrap.errors import SetupError
from bootstrap.installer import Installer

__all__ = ["TorchSource", "choose_torch"]

VARIABLE = "HUNYUAN_TORCH_SOURCE"


@dataclass(frozen=True)
class TorchSource:
    """A lock file, the options that find what it names, and what that costs.

    Attributes:
        download, installed: bytes, about.
    """

    lock: Path
    options: tuple[str, ...]
    description: str
    download: float
    installed: float


def choose_torch(requirements: Path, installer: Installer, environ: Mapping[str, str]) -> TorchSource:
    """Ask the sources in turn.

    Raises:
        SetupError: the user named a source that does not have it, or no source could be asked.
    """
    lock = requirements / "torch-cpu.txt"
    named = environ.get(VARIABLE, "").strip()
    options = _options(named)
    if installer.offers(lock, options):
        where = named or "the sources pip is set to"
        return TorchSource(lock, options, f"torch for the CPU from {where}", 0.19e9, 0.75e9)
    if named:
        wanted = lock.read_text().split()[-1]
        raise SetupError(f"{VARIABLE}={named} has no {wanted} for this Python and machine: check it, or unset it")
    description = (
        f"torch with its CUDA libraries (no CPU build in pip's sources; name a wheel folder or index with {VARIABLE}= "
        "to download a tenth of it)"
    )
    return TorchSource(requirements / "torch-pypi.txt", (), description, 2.3e9, 3.5e9)


def _options(named: str) -> tuple[str, ...]:
    if not named:
        return ()
    if named.startswith(("http://", "https://")):
        return ("--extra-index-url", named)
    if Path(named).is_dir():
        return ("--find-links", str(Path(named).resolve()))
    raise SetupError(f"{VARIABLE}={named} is neither a folder of wheels nor the URL of a package index")
