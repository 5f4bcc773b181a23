"""The chat itself: asks, shows the answer as it comes, and stops it at Ctrl-C."""

from __future__ import annotations

import contextlib
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from hunyuan_vllm.chat.client import Client, Model, Usage
from hunyuan_vllm.chat.commands import Again, Commands, Leave
from hunyuan_vllm.chat.conversation import Conversation
from hunyuan_vllm.chat.meter import Meter
from hunyuan_vllm.chat.sampling import Sampling
from hunyuan_vllm.errors import UserError

if TYPE_CHECKING:  # one question needs no prompt, which takes a while to import
    from hunyuan_vllm.chat.prompt import Prompt

__all__ = ["Chat", "choose", "printable"]

STOPPED = "stopped"
ENDS = {"length": "cut off: it reached max_tokens or the end of the context", STOPPED: "stopped"}


@dataclass
class Chat:
    """A conversation with one model of a server.

    Attributes:
        output: where answers go.
        notes: where all else goes: costs, errors, what a command says.
    """

    client: Client
    model: Model
    conversation: Conversation
    sampling: Sampling
    output: Console
    notes: Console

    def run(self, prompt: Prompt) -> None:
        """Talk until the user leaves. A failure of the server ends an answer, not the chat."""
        commands = Commands(self.conversation, self.sampling)
        self._note(f"{self.model.name} at {self.client.url}. /help shows what there is.")
        while True:
            try:
                line = prompt.ask()
                said = commands.run(line) if line.startswith("/") else Again(line) if line else ""
                if isinstance(said, Again):
                    self.answer(said.question)
                elif said:
                    self._note(said)
            except KeyboardInterrupt:
                self._note("Ctrl-D or /quit leaves")
            except UserError as error:
                self.notes.print(Text(f"! {error}", style="red"))
            except (EOFError, Leave):
                return

    def answer(self, question: str) -> bool:
        """Ask, and show the answer as it comes and what it cost; False if Ctrl-C ended it. What came of it is kept.

        Raises:
            UserError: the server refused, or failed on the way.
        """
        self.conversation.ask(question)
        messages = self.conversation.messages()
        request = {"model": self.model.name, "messages": messages, **self.sampling.request()}
        meter, text, usage, finish = Meter(), "", None, None
        try:
            with contextlib.closing(self.client.stream(request)) as parts:
                for part in parts:
                    text += part.text
                    self._write(printable(part.text))
                    usage, finish = part.usage or usage, part.finish or finish
                    if part.usage and part.usage.completion:
                        meter.note(part.usage.completion)
        except KeyboardInterrupt:
            finish = STOPPED
        finally:
            self.conversation.answer(text)
            self._write("\n")
        self._note(_cost(usage, meter, self.model.context, finish))
        return finish != STOPPED

    def _write(self, text: str) -> None:
        self.output.file.write(text)
        self.output.file.flush()

    def _note(self, text: str) -> None:
        self.notes.print(Text(text, style="dim"))


def choose(models: list[Model], name: str | None) -> Model:
    """The model of that name, or the first.

    Raises:
        UserError: there is none.
    """
    for model in models:
        if name in (None, model.name):
            return model
    raise UserError(f"the server has no model {name}: it has {', '.join(model.name for model in models)}")


def printable(text: str) -> str:
    """The text without what would command the terminal: a model may write anything, escape sequences among it."""
    return "".join(character for character in text if character in "\n\t" or unicodedata.category(character) != "Cc")


def _cost(usage: Usage | None, meter: Meter, context: int | None, finish: str | None) -> str:
    parts = [ENDS[finish]] if finish in ENDS else []
    if usage:
        parts.append(f"{usage.prompt} tokens in, {usage.completion} out")
    if meter.rate:
        parts.append(f"{meter.rate:.1f} tokens/s")
    if meter.wait is not None:
        parts.append(f"first token after {meter.wait:.2f} s")
    if usage and context:
        parts.append(f"{usage.prompt + usage.completion} of {context} tokens of context")
    return " · ".join(parts)
