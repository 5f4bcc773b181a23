"""uv if the package index has it, else pip, behind one call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bootstrap.errors import SetupError
from bootstrap.pip_config import Sources, read_sources
from bootstrap.progress import Progress

__all__ = ["Installer"]

NOTHING_COMPILED = {"DS_BUILD_OPS": "0"}  # DeepSpeed compiles an operator when it is first used, and most never are


class Installer:
    """Installs into the environment of `python`."""

    def __init__(self, python: Path, progress: Progress) -> None:
        self.python, self.progress = python, progress
        self.sources: Sources = read_sources(python)
        self._uv: Path | None = python.with_name("uv") if python.with_name("uv").exists() else None

    def fetch_uv(self, requirement: Path) -> None:
        """Install uv with pip; where there is no uv for this machine, stay with pip.

        Raises:
            SetupError: the index is out of reach or the disk full; no later step could succeed.
        """
        try:
            self.progress.run([*self._pip(), "-r", requirement], "fetching the installer (uv)")
            self._uv = self.python.with_name("uv")
        except SetupError as error:
            if "no connection" in str(error) or "disk" in str(error):
                raise
            self.progress.say(f"uv is not to be had ({error}); installing with pip, which takes longer")

    def install(self, what: Sequence[str | Path], doing: str, extra: Sequence[str] = ()) -> None:
        """Install exactly `what` (requirement arguments), without dependencies.

        Args:
            what: arguments such as "-r", a lock file's path, "-e", a folder.
            doing: the words of an error message.
            extra: further options both uv and pip understand (--find-links, --extra-index-url).
        """
        if self._uv is None:
            self.progress.run([*self._pip(), *what, *extra], doing, {**NOTHING_COMPILED, **os.environ})
            return
        env = {**NOTHING_COMPILED, **self.sources.env, **os.environ}
        self.progress.run([*self._uv_pip(), *self.sources.uv_args(), *extra, *what], doing, env)

    def offers(self, lock: Path, extra: Sequence[str] = ()) -> bool:
        """Whether the sources have what `lock` names, for this Python.

        Raises:
            SetupError: they could not be asked.
        """
        try:
            self.install(["--dry-run", "-r", lock], f"looking for {lock.stem}", extra)
        except SetupError as error:
            if "no connection" in str(error):
                raise
            return False
        return True

    def _pip(self) -> list[str | Path]:
        return [self.python, "-m", "pip", "install", "--no-deps", "--retries", "2", "--disable-pip-version-check"]

    def _uv_pip(self) -> list[str | Path]:
        assert self._uv is not None
        return [self._uv, "pip", "install", "--python", self.python, "--no-deps"]
