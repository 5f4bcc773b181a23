"""`hunyuan-vllm chat`: talk to a served model in a terminal, or ask it one question from a script."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

__all__ = ["chat"]

FAILED, INTERRUPTED = 1, 130  # exit statuses


def chat(
    question: str = typer.Argument(None, metavar="QUESTION", help="Ask only this, print the answer, and end."),
    url: str = typer.Option(None, help="The server; default: this machine's, by HOST or LOCAL_IP, and PORT."),
    model: str = typer.Option(None, help="A model or adapter of the server; default: its first."),
    system: str = typer.Option("", help="System prompt."),
    temperature: float = typer.Option(0.7, help="0 always takes the likeliest token."),
    top_p: float = typer.Option(0.6),
    top_k: int = typer.Option(20, help="0 for all."),
    repetition_penalty: float = typer.Option(1.05),
    max_tokens: int = typer.Option(None, help="Most tokens of an answer; default: what the context has room for."),
    seed: int = typer.Option(None, help="Same seed, same answer."),
    key_file: Path = typer.Option(None, help="File (chmod 600) with the server's API key."),
    ca: Path = typer.Option(None, help="PEM file with the authority of an HTTPS server's certificate."),
    history: bool = typer.Option(True, help="Keep what is typed in ~/.local/state/hunyuan-vllm/chat-history."),
) -> None:
    """Chat with a served model in this terminal.

    Answers appear as they are generated; Ctrl-C stops one. Sampling starts with
    the published values. /help in the chat lists /system, /set, /again, /clear
    and /save.

    \b
    Examples:
      hunyuan-vllm chat
          with the server that `hunyuan-vllm serve` started here
      hunyuan-vllm chat --url http://10.0.0.5:8020 --key-file ~/hunyuan.key
      hunyuan-vllm chat --temperature 0 "Why is sea water salty?"
      hunyuan-vllm chat < question.txt > answer.txt
          one question from a file; what it cost goes to standard error

    \b
    Environment variables:
      HOST, LOCAL_IP, PORT  where the server is, as for `serve`
      VLLM_API_KEY, or HUNYUAN_VLLM_API_KEY_FILE
                            its key; for a server on this machine, the file
                            that `serve` made is found without them
      XDG_STATE_HOME        folder instead of ~/.local/state

    Exit status: 0; 1 where the one question failed on the way, 130 where Ctrl-C ended its answer; 2 where there is no
    server, or it wants another key.
    """
    from rich.console import Console

    from hunyuan_vllm.chat.access import checked_url, default_url, find_key
    from hunyuan_vllm.chat.client import Client
    from hunyuan_vllm.chat.commands import HELP
    from hunyuan_vllm.chat.conversation import Conversation
    from hunyuan_vllm.chat.sampling import Sampling
    from hunyuan_vllm.chat.terminal import Chat, choose
    from hunyuan_vllm.errors import UserError

    sampling = Sampling()
    given = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    for name, value in given.items():
        if value is not None:
            sampling.set(name, str(value))
    url = checked_url(url) if url else default_url(os.environ)
    client = Client(url, find_key(url, key_file, os.environ), ca)
    chosen = choose(client.models(), model)
    talk = Chat(client, chosen, Conversation(system), sampling, Console(), Console(stderr=True))
    if question is None and sys.stdin.isatty():
        from hunyuan_vllm.chat.prompt import Prompt

        state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "hunyuan-vllm"
        talk.run(Prompt([usage.split()[0] for usage in HELP], state / "chat-history" if history else None))
        return
    text = question if question is not None else sys.stdin.read().strip()
    if not text:
        raise UserError("there is no question: give one, or come from a terminal to chat")
    try:
        whole = talk.answer(text)
    except UserError as error:
        print(f"hunyuan-vllm: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    if not whole:
        raise typer.Exit(INTERRUPTED)
