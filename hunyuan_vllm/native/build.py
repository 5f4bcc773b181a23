"""Compiles the C++ kernels with the machine's own compiler, once, into a directory that only its user can write to."""

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

DIRECTORY = Path(__file__).parent
_TORCH = Path(torch.__file__).parent
AVX512 = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16", "avx512_vbmi", "avx512_vnni")
_TORCH_ABI = "0x020a000000000000"  # 2.10, the oldest whose stable interface has all we call
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-w",
    "-mavx2",
    "-mfma",
    f"-DTORCH_TARGET_VERSION={_TORCH_ABI}",
    f"-I{_TORCH / 'include'}",
    f"-L{_TORCH / 'lib'}",
)


class Unavailable(Exception):
    """Why there are no kernels; and what to do, if anything can be done."""


def has_avx512() -> bool:
    """Whether this CPU has all that the AVX-512 kernels need; the others are for AVX2."""
    has = torch.cpu.get_capabilities()
    return all(has.get(name) for name in AVX512)


def require_features() -> None:
    """Raises Unavailable if the kernels cannot run on this machine."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Unavailable("they are for x86 CPUs on Linux")
    has = torch.cpu.get_capabilities()
    if missing := [name for name in ("avx2", "fma3") if not has.get(name)]:
        raise Unavailable(f"this CPU lacks {', '.join(missing)}")


def build(directory: Path) -> Path:
    """Path of the compiled kernels in `directory`; compiled, in seconds, if they are not there yet.

    Raises:
        Unavailable: there is no compiler, it fails, or others can write to the directory.
    """
    compiler = _compiler()
    _make_private(directory)
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"{shlex.join(compiler)} does not run ({error}): set CXX to a C++ compiler") from error
    sources = sorted([*DIRECTORY.glob("*.cpp"), *DIRECTORY.glob("*.h")])
    features = [f"-m{name.replace('_', '')}" for name in AVX512] if has_avx512() else []
    command = [*compiler, *_FLAGS, *features, *(str(path) for path in sources if path.suffix == ".cpp")]
    parts = (
        *(path.read_bytes() for path in sources),
        version,
        shlex.join(command).encode(),
        torch.__version__.encode(),
    )
    target = directory / f"{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    if not target.exists():
        # Beside, then renamed: other processes find the whole file or none, and compile the same one meanwhile.
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            beside = Path(scratch) / target.name
            run = subprocess.run([*command, "-o", str(beside), "-ltorch_cpu"], capture_output=True, text=True)
            if run.returncode:
                reason = _first_error(run.stderr)
                raise Unavailable(f"{shlex.join(compiler)} failed, and GCC 10 or newer is needed: {reason}")
            beside.replace(target)
    return target


def _compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise Unavailable("there is no C++ compiler: install one (Debian, Ubuntu: apt-get install g++) or set CXX")
    return [found]


def _make_private(directory: Path) -> None:
    """A library is code: load none from where others could have put it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise Unavailable(
            f"{directory} cannot be created ({error.strerror}): set VLLM_CACHE_ROOT to another"
        ) from error
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unavailable(f"others can write to {directory}: chmod 700 it, or set VLLM_CACHE_ROOT")


def _first_error(output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line]
    return (lines or output.splitlines() or ["no output"])[0]
