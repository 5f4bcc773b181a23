"""`hunyuan-vllm chat` for tests: at a pseudo-terminal, and run by a script."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
from serving import COMMAND, Server

__all__ = ["ALT_ENTER", "CTRL_C", "CTRL_D", "UP", "Terminal", "environment", "run", "terminal"]

CTRL_C, CTRL_D, UP, ALT_ENTER = "\x03", "\x04", "\x1b[A", "\x1b\r"
PATIENCE = 30  # seconds
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|\r")


def environment(home: Path, **more: str) -> dict[str, str]:
    ours = {"VLLM_API_KEY", "HUNYUAN_VLLM_API_KEY_FILE", "HOST", "LOCAL_IP", "PORT", "XDG_CONFIG_HOME", "COLUMNS"}
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return inherited | {"HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": ""} | more


class Terminal:
    """The chat at a terminal of 160 columns, where no line is broken."""

    def __init__(self, arguments: list[str], environ: dict[str, str], folder: Path) -> None:
        self.child = pexpect.spawn(
            str(COMMAND),
            ["chat", *arguments],
            env=environ,
            cwd=str(folder),
            timeout=PATIENCE,
            encoding="utf-8",
            dimensions=(40, 160),
        )

    def type(self, text: str, end: str = "\r") -> None:
        self.child.send(text + end)

    def see(self, pattern: str) -> str:
        """Wait for it; what was there until then and itself, without the terminal's escape sequences."""
        self.child.expect(pattern)
        return ESCAPES.sub("", self.child.before + self.child.after)

    def leave(self) -> None:
        self.type("", CTRL_D)
        self.child.expect(pexpect.EOF)
        self.child.close()
        assert self.child.exitstatus == 0


@contextmanager
def terminal(server: Server, key_file: Path, home: Path, *options: str) -> Iterator[Terminal]:
    at = Terminal(["--url", server.url, "--key-file", str(key_file), *options], environment(home), home)
    try:
        at.see("/help shows what there is")
        yield at
    finally:
        at.child.close(force=True)


def run(*arguments: str, home: Path, typed: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, "chat", *arguments],
        input=typed,
        env=environment(home, **environ),
        capture_output=True,
        text=True,
        timeout=60,
    )
