"""The line (or lines) a user types: history, completion of commands, several lines."""

from __future__ import annotations

import os
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

__all__ = ["Prompt"]

CONTINUES = "\\"


class Prompt:
    """Asks at a terminal. What was typed before is in a file that only its user can read, or in memory without one."""

    def __init__(self, commands: list[str], history: Path | None) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(history),
            completer=WordCompleter(commands, sentence=True),
            complete_while_typing=False,
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
        )

    def ask(self) -> str:
        """What the user typed.

        Raises:
            EOFError: Ctrl-D on an empty line.
            KeyboardInterrupt: Ctrl-C.
        """
        return self._session.prompt("> ").strip()


def _keys() -> KeyBindings:
    """Enter sends, unless the line ends in a backslash; Alt-Enter makes a new line, and so does a paste."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith(CONTINUES):
            buffer.delete_before_cursor(len(CONTINUES))
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history(file: Path | None) -> History:
    if file is None:
        return InMemoryHistory()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()  # a home that cannot be written is no reason not to chat
    return FileHistory(str(file))
