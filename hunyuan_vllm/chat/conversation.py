"""What was said so far, and how it is kept in a file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from hunyuan_vllm.errors import UserError

__all__ = ["Conversation"]


@dataclass
class Conversation:
    """Questions and answers in turn.

    Attributes:
        system: what the model is told before all else; "" for nothing.
        turns: {"role": "user" or "assistant", "content": …}, oldest first.
    """

    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """As a request carries them."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.turns

    def ask(self, question: str) -> None:
        self.turns.append({"role": "user", "content": question})

    def answer(self, text: str) -> None:
        """The answer to the last question; without any text the question counts as not asked."""
        if text:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.turns.pop()

    def take_back_answer(self) -> str | None:
        """Forget the last question and its answer and return the question; None if there is none."""
        if not self.turns:
            return None
        question = self.turns[-2]["content"]
        del self.turns[-2:]
        return question

    def save(self, file: Path) -> None:
        """Write the messages to a new file: JSON where its name ends in .json, else Markdown.

        Raises:
            UserError: it is there already, or cannot be written.
        """
        if file.exists():
            raise UserError(f"{file} is there already: choose another name")
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            beside.write_text(self._json() if file.suffix == ".json" else self._markdown(), encoding="utf-8")
            beside.rename(file)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror}") from None

    def _json(self) -> str:
        return json.dumps({"messages": self.messages()}, ensure_ascii=False, indent=2) + "\n"

    def _markdown(self) -> str:
        return "\n".join(f"## {message['role']}\n\n{message['content']}\n" for message in self.messages())
