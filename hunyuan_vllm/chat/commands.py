"""What a line that begins with `/` does in a chat."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hunyuan_vllm.chat.conversation import Conversation
from hunyuan_vllm.chat.sampling import Sampling
from hunyuan_vllm.errors import UserError

__all__ = ["HELP", "Again", "Commands", "Leave"]

HELP = {
    "/system [TEXT]": "show or set the system prompt; /system - removes it",
    "/set [NAME VALUE]": "show or set temperature, top_p, top_k, repetition_penalty, max_tokens, seed",
    "/again": "answer the last question anew",
    "/clear": "forget the conversation, keep the system prompt",
    "/save FILE": "write the conversation to a new file: JSON if its name ends in .json, else Markdown",
    "/help": "this",
    "/quit": "leave, as Ctrl-D does",
}
KEYS = "Enter sends; Alt-Enter or \\ at the end makes a new line; ↑ brings back what you typed; Ctrl-C stops an answer."


class Leave(Exception):
    """The user wants to go."""


@dataclass(frozen=True)
class Again:
    """The user wants another answer to `question`."""

    question: str


@dataclass
class Commands:
    """Carries out commands on a conversation and its sampling parameters."""

    conversation: Conversation
    sampling: Sampling
    _table: dict[str, Callable[[str], str | Again]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._table = {
            "/system": self._system,
            "/set": self._set,
            "/again": self._again,
            "/clear": self._clear,
            "/save": self._save,
            "/help": self._help,
            "/quit": self._quit,
        }

    def run(self, line: str) -> str | Again:
        """Carry out `line` and return what to tell the user, or that a question is to be asked again.

        Raises:
            UserError: there is no such command, or it cannot be done.
            Leave: the user wants to go.
        """
        name, _, rest = line.strip().partition(" ")
        if name not in self._table:
            near = difflib.get_close_matches(name, self._table, n=1)
            raise UserError(f"there is no {name}" + (f": did you mean {near[0]}?" if near else "; /help lists what is"))
        return self._table[name](rest.strip())

    def _system(self, text: str) -> str:
        if text:
            self.conversation.system = "" if text == "-" else text
        return f"system prompt: {self.conversation.system}" if self.conversation.system else "no system prompt"

    def _set(self, text: str) -> str:
        if text:
            name, _, value = text.replace("=", " ").partition(" ")
            self.sampling.set(name, value.strip())
        values = self.sampling.model_dump()
        return "  ".join(f"{name}={'default' if value is None else value}" for name, value in values.items())

    def _again(self, text: str) -> Again:
        question = self.conversation.take_back_answer()
        if question is None:
            raise UserError("nothing was asked yet")
        return Again(question)

    def _clear(self, text: str) -> str:
        self.conversation.turns.clear()
        return "the conversation is forgotten"

    def _save(self, text: str) -> str:
        if not text:
            raise UserError("name the file: /save chat.md, or /save chat.json")
        file = Path(text).expanduser()
        self.conversation.save(file)
        return f"saved in {file}"

    def _help(self, text: str) -> str:
        width = max(map(len, HELP))
        return "\n".join([*(f"{usage:{width}}  {meaning}" for usage, meaning in HELP.items()), KEYS])

    def _quit(self, text: str) -> str:
        raise Leave
