"""`hunyuan-vllm batch`: a JSONL file of requests in, a JSONL file of answers out."""

import json
import os
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from hunyuan_vllm.util.errors import UserError

SAMPLING = "Defaults for lines without the field (otherwise generation_config.json's)"


def batch(
    context: typer.Context,
    source: Path = typer.Argument(metavar="IN.jsonl", help="Requests, one per line.", show_default=False),
    target: Path = typer.Argument(metavar="OUT.jsonl", help="Answers, one per line.", show_default=False),
    model: str = typer.Option(
        None, "--model", help="Checkpoint directory or hub name; default: MODEL_PATH, else the demo model."
    ),
    retry_failed: bool = typer.Option(False, "--retry-failed", help="Run lines again whose record has an error."),
    max_tokens: int = typer.Option(None, help="Maximum tokens of an answer.", rich_help_panel=SAMPLING),
    temperature: float = typer.Option(None, help="0: always the most likely token.", rich_help_panel=SAMPLING),
    params: str = typer.Option(
        None,
        help='Any other fields of a request, as in \'{"top_p": 0.9, "seed": 1}\'; a seed counts up with the lines.',
        rich_help_panel=SAMPLING,
        metavar="JSON",
    ),
) -> None:
    """Answer every line of a JSONL file.

    vLLM's own flags may follow the file names (vllm serve --help=all).

    \b
    Examples:
      hunyuan-vllm batch questions.jsonl answers.jsonl
      hunyuan-vllm batch in.jsonl out.jsonl --model /models/hunyuan-large
          --temperature 0 --max-tokens 512 --tensor-parallel-size 8

    \b
    A line is one of
      {"messages": [{"role": "user", "content": "Hello"}]}
      {"prompt": "Once upon a time", "max_tokens": 64}
      {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
       "body": {"messages": [...]}}
    with any field of that OpenAI request (temperature, top_p, top_k, seed, n,
    stop, logprobs, ...) and, if you like, an "id".

    \b
    Its record in OUT.jsonl has the "line" number, the "id", the "input" and
      "outputs": [{"text": ..., "finish_reason": ...}] and "usage", or
      "error": {"message": ..., "param": "temperature", ...}
    A line in the form of OpenAI's Batch API gets a "response" in that form.
    Records are in the order in which lines are finished.

    After an interruption, the same command continues: lines with a record in OUT.jsonl are not run again.

    \b
    Exit status: 0 every line has an answer, 1 some have an error, 2 nothing
    was run, 3 the engine or the disk failed, 130 interrupted.
    """
    from hunyuan_vllm.batch.process_group import run_in_session
    from hunyuan_vllm.plugin import check_engine

    check_engine()
    if str(source).startswith("-") or str(target).startswith("-"):
        raise UserError("IN.jsonl and OUT.jsonl come first, vLLM's flags after them")
    named = {"max_tokens": max_tokens, "temperature": temperature}
    defaults = _json_object(params) | {name: value for name, value in named.items() if value is not None}

    def run() -> int:
        from hunyuan_vllm.batch.job import run_batch
        from hunyuan_vllm.server.models import open_model

        checkpoint = open_model(model or os.environ.get("MODEL_PATH", "").strip())
        return run_batch(
            source,
            target.resolve(),
            checkpoint,
            Console(stderr=True),
            defaults=defaults,
            flags=context.args,
            retry_failed=retry_failed,
        )

    raise typer.Exit(run_in_session(run))


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"--params {text} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"--params {text} is not a JSON object, as in --params '{{\"logprobs\": true}}'")
    return {name: given for name, given in value.items() if given is not None}
