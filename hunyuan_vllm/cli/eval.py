"""`hunyuan-vllm eval`: how far a quantised model is from the BF16 one, and benchmarks on a running server"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from hunyuan_vllm.cli.show import show_table
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.streams import say

STOPPED = 3  # exit status
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(help="Measure quality: against BF16, or on benchmark tasks.", no_args_is_help=True)


@app.command(context_settings=PASS_THROUGH)
def compare(
    context: typer.Context,
    model: str = typer.Argument(
        None, metavar="[MODEL]", help="Checkpoint directory or hub name; default: MODEL_PATH, else the demo model."
    ),
    a: str = typer.Option("bf16", "--a", metavar="SCHEME", help="Scheme to compare with."),
    b: list[str] = typer.Option(
        ..., "--b", metavar="SCHEME", help="Scheme to measure; may be repeated.", show_default=False
    ),
    text: Path = typer.Option(
        None,
        help="UTF-8 text, or .jsonl with one chat or text per line; default: ours, Chinese and English, and for the "
        "demo model its held-out questions.",
    ),
    window: int = typer.Option(512, "--context", min=2, help="Maximum tokens of a passage."),
    limit: int = typer.Option(None, min=1, help="Maximum number of scored tokens."),
    work: Path = typer.Option(None, help="Directory for A's logits during the run; default: the temporary directory."),
    as_json: bool = typer.Option(False, "--json", help="Print every figure as JSON instead of the table."),
) -> None:
    """Compare quantisation schemes by what the model predicts.

    Each runs in an engine, one after the other. At every token of the text the whole distributions are compared:
    perplexity, share of tokens with the same most likely token, and KL(A‖B) in nats with its quantiles. vLLM's own
    flags may follow (vllm serve --help=all).

    \b
    Schemes:
      bf16       the checkpoint as it is
      int8       int8 weights, quantised while loading
      int8-w8a8  int8 weights and inputs, quantised while loading
      fp8        FP8 weights, inputs and cache; from an FP8 checkpoint, which
                 hunyuan-vllm quantize writes (the demo model's is made once)
      kv-fp8     bf16 with an FP8 KV cache
    +kv-fp8 or +kv-bf16 after a name sets its KV cache, :PATH its checkpoint.

    \b
    Examples:
      hunyuan-vllm eval compare --b int8 --b int8-w8a8 --b kv-fp8
          the demo model
      hunyuan-vllm eval compare /models/hunyuan-large --b int8+kv-fp8
          --text chats.jsonl --context 2048 --tensor-parallel-size 16
      hunyuan-vllm eval compare /models/hunyuan-large --b fp8:/models/hunyuan-fp8
          --json | jq '.compared[].kl_mean'

    \b
    A line of a .jsonl file is one of
      {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}
          of which the assistant's tokens count
      {"text": "..."}
          of which all tokens count

    A's logits are kept on disk until the end: 258 kB per token for Hunyuan-Large.

    \b
    Exit status: 0 done, 2 nothing was run, 3 an engine failed, 130 interrupted.
    """
    from hunyuan_vllm.batch.process_group import run_in_session
    from hunyuan_vllm.evaluation.engines import Variant

    path, flags = _model_first(model, context.args)
    first, others = Variant.parse(a), [Variant.parse(one) for one in b]

    def run() -> int:
        from hunyuan_vllm.evaluation.compare import default_passages, distance_table, distances_json, measure
        from hunyuan_vllm.evaluation.engines import EngineFailed
        from hunyuan_vllm.evaluation.passages import limited, read_passages
        from hunyuan_vllm.server.models import open_model
        from hunyuan_vllm.tokenizer import load_tokenizer

        source = open_model(path)
        tokenizer = load_tokenizer(source.name)
        passages = read_passages(text, tokenizer, window) if text else default_passages(source, tokenizer, window)
        console = Console(stderr=True)
        try:
            compared = measure(source, first, others, limited(passages, limit), flags, work, console)
        except EngineFailed as error:
            say(str(error))
            return STOPPED
        if as_json:
            print(json.dumps(distances_json(source.given, first.label, compared), indent=1, ensure_ascii=False))
        else:
            show_table(distance_table(first.label, compared))
        return 0

    raise typer.Exit(run_in_session(run))


@app.command()
def tasks(
    url: str = typer.Option("http://127.0.0.1:8020", help="The server."),
    names: str = typer.Option(
        "hunyuan_demo,hunyuan_demo_choice", "--tasks", metavar="A,B,...", help="Tasks or groups; `published` is below."
    ),
    num_fewshot: int = typer.Option(None, min=0, help="Solved examples before each question; default: as below."),
    chat: bool = typer.Option(None, "--chat/--no-chat", help="Ask in the chat format; default: as below."),
    limit: int = typer.Option(None, min=1, help="Questions of each task."),
    concurrency: int = typer.Option(16, min=1, help="Requests in flight."),
    tokenizer: Path = typer.Option(
        None,
        metavar="DIRECTORY",
        help="Directory of the tokenizer; default: the server's checkpoint, if it is on this machine.",
    ),
    api_key_file: Path = typer.Option(
        None,
        "--key-file",
        help="File (chmod 600) with the server's API key; default: VLLM_API_KEY, HUNYUAN_VLLM_API_KEY_FILE, or for a "
        "server on this machine the key that `serve` made.",
    ),
    include: Path = typer.Option(None, metavar="DIRECTORY", help="More tasks, as YAML files of lm-evaluation-harness."),
    output: Path = typer.Option(None, metavar="FILE", help="Write all results as JSON, with the answers."),
) -> None:
    """Ask a running server benchmark questions, with lm-evaluation-harness (pip install 'hunyuan-vllm[eval]').

    \b
    Tasks:
      hunyuan_demo           the demo model's held-out questions, as chats
      hunyuan_demo_choice    the same, right answer against near misses
      published              those of Hunyuan-Large's published table, as text:
                             arc_challenge_letters (25 shots), ceval-valid, cmmlu
                             and mmlu (5 shots each). The shots are assumed; the
                             table does not give them.
      any other              of lm-evaluation-harness, with its own settings
                             (`lm_eval ls tasks`); data come from the Hugging
                             Face hub

    \b
    Examples:
      hunyuan-vllm eval tasks
          the demo model, served on this machine by `hunyuan-vllm serve`
      hunyuan-vllm eval tasks --url http://10.0.0.5:8020 --tasks published
          --key-file ~/.config/hunyuan-vllm/api-key --output scores.json

    \b
    Exit status: 0 done, 2 nothing was run, 3 the server stopped answering,
    130 interrupted.
    """
    from hunyuan_vllm.bench.client import connect, find_key
    from hunyuan_vllm.evaluation.tasks import Harness, ServerFailed, task_names
    from hunyuan_vllm.util.files import replacing

    wanted = task_names(names)
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: {output.absolute().parent} is not a directory")
    served = connect(url, find_key(url, api_key_file, os.environ))
    harness = Harness(served, served.tokenizer(tokenizer), concurrency, include)
    for name in wanted:
        harness.load(name)
    found = {}
    for name in wanted:
        try:
            found[name] = harness.run(name, num_fewshot, chat, limit)
        except ServerFailed as error:
            say(str(error))
            raise typer.Exit(STOPPED) from None
        show_table(_scores(found[name]))
        if output is not None:
            with replacing(output) as temporary:
                text = json.dumps(found, indent=1, ensure_ascii=False, default=str)
                temporary.write_text(text + "\n", encoding="utf-8")


def _scores(results: Mapping[str, Any]) -> Table:
    """lm-evaluation-harness's results: of a group, those of the group."""
    table = Table("task", "metric", "score", "standard error", "shots", box=None)
    for task, scores in (results.get("groups") or results["results"]).items():
        for name, score in scores.items():
            metric, _, answers = name.partition(",")  # which answers: "none" for all as they are
            if answers and not metric.endswith("_stderr"):
                error, shots = scores.get(f"{metric}_stderr,{answers}", ""), results["n-shot"].get(task, "")
                words = (f"{value:.4f}" if isinstance(value, float) else str(value) for value in (score, error))
                table.add_row(task, metric if answers == "none" else name, *words, str(shots))
    return table


def _model_first(model: str | None, rest: list[str]) -> tuple[str | None, list[str]]:
    """The model, if it is given, and vLLM's flags, of which the parser may have taken one for the model."""
    if model is not None and model.startswith("-"):
        return os.environ.get("MODEL_PATH", "").strip() or None, [model, *rest]
    if rest and not rest[0].startswith("-"):
        raise UserError(f"{rest[0]!r} is one argument too many: MODEL comes first, then flags that begin with --")
    return model or os.environ.get("MODEL_PATH", "").strip() or None, rest
