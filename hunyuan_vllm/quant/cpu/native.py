"""Our C++ kernels: compiled once by the machine's own compiler, kept in a folder only its user can write to.

Nothing of torch or Python is compiled in, so it takes seconds, and one file serves every Python and torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from vllm.logger import init_logger

from hunyuan_vllm import envs

__all__ = ["Unavailable", "build", "kernels"]

logger = init_logger(f"vllm.{__name__}")

SOURCE = Path(__file__).with_name("w8a16.cpp")
_FEATURES = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_bf16", "avx512_vbmi")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", *(f"-m{name.replace('_', '')}" for name in _FEATURES), "-mfma")

_POINTER, _SIZE, _COUNT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "w8a16_blocks": [_SIZE],
    "w8a16_pack": [_POINTER] * 2 + [_SIZE] * 2 + [_COUNT],
    "w8a16_linear": [_POINTER] * 2 + [_SIZE] + [_POINTER] * 3 + [_SIZE] * 3 + [_COUNT],
    "w8a16_experts": [_POINTER] * 2 + [_SIZE] + [_POINTER] * 8 + [_SIZE] * 5 + [_COUNT],
}


class Unavailable(Exception):
    """Why there are no kernels; and what to do, if anything can be done."""


@cache
def kernels() -> ctypes.CDLL | None:
    """The kernels, or None where they cannot be had; then the log says why, once. The first call may compile."""
    if not envs.native_kernels():
        return None
    try:
        _require_features()
        library = ctypes.CDLL(str(build(envs.cache_folder() / "kernels")))
    except (Unavailable, OSError) as error:
        logger.warning("int8 weights are multiplied by plain torch, which is slow: %s", error)
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = _SIZE if name == "w8a16_blocks" else None
    return library


def build(folder: Path) -> Path:
    """Path of the compiled kernels in `folder`; compiled if they are not there yet.

    Raises:
        Unavailable: there is no compiler, it fails, or others can write to the folder.
    """
    compiler = _compiler()
    _make_private(folder)
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"{shlex.join(compiler)} does not run ({error}): set CXX to a C++ compiler") from error
    parts = (SOURCE.read_bytes(), version, shlex.join([*compiler, *_FLAGS]).encode())
    target = folder / f"w8a16-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    if not target.exists():
        # Beside, then renamed: other processes find the whole file or none, and compile the same one meanwhile.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            beside = Path(scratch) / target.name
            run = subprocess.run([*compiler, *_FLAGS, str(SOURCE), "-o", str(beside)], capture_output=True, text=True)
            if run.returncode:
                raise Unavailable(
                    f"{shlex.join(compiler)} failed (GCC 10 or newer is needed): {_first_error(run.stderr)}"
                )
            beside.replace(target)
    return target


def _require_features() -> None:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Unavailable("the kernel is for x86 CPUs on Linux")
    has = torch.cpu.get_capabilities()
    missing = [name for name in _FEATURES if not has.get(name)]
    if missing:
        raise Unavailable(f"this CPU lacks {', '.join(missing)}")


def _compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise Unavailable("there is no C++ compiler: install one (Debian, Ubuntu: apt-get install g++) or set CXX")
    return [found]


def _make_private(folder: Path) -> None:
    """A library is code: load none from where others could have put it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise Unavailable(f"no folder {folder} ({error.strerror}): set VLLM_CACHE_ROOT to one of yours") from error
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unavailable(f"others can write to {folder}: chmod 700 it, or set VLLM_CACHE_ROOT")


def _first_error(output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line]
    return (lines or output.splitlines() or ["it said nothing"])[0]
