"""`hunyuan-vllm eval`: how far a quantised model is from the BF16 one, and benchmarks on a running server"""

import json
import os
from pathlib import Path

import typer
from rich.console import Console

from hunyuan_vllm.cli.show import show_table
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.streams import say

BROKEN_LIMIT, STOPPED = 1, 3  # exit statuses
LIMITS = "Limits (exit status 1 if one is exceeded)"
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(help="Measure quality: against BF16, or on benchmark tasks.", no_args_is_help=True)


@app.command(context_settings=PASS_THROUGH)
def compare(
    context: typer.Context,
    model: str = typer.Argument(
        None, metavar="[MODEL]", help="Checkpoint folder or hub name; default: MODEL_PATH, else the demo model."
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
    work: Path = typer.Option(None, help="Folder for A's logits during the run; default: the temporary folder."),
    as_json: bool = typer.Option(False, "--json", help="Print every figure as JSON instead of the table."),
    min_agreement: float = typer.Option(
        None, min=0, max=1, help="Minimum top-1 agreement, such as 0.98.", rich_help_panel=LIMITS
    ),
    max_kl: float = typer.Option(None, min=0, help="Maximum mean KL in nats.", rich_help_panel=LIMITS),
    max_perplexity_ratio: float = typer.Option(
        None, min=0, help="Maximum perplexity ratio, such as 1.01.", rich_help_panel=LIMITS
    ),
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
          --min-agreement 0.96 --json

    \b
    A line of a .jsonl file is one of
      {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}
          of which the assistant's tokens count
      {"text": "..."}
          of which all tokens count

    A's logits are kept on disk until the end: 258 kB per token for Hunyuan-Large.

    \b
    Exit status: 0 done, 1 a limit is exceeded, 2 nothing was run, 3 an engine
    failed, 130 interrupted.
    """
    from hunyuan_vllm.batch.process_group import run_in_session
    from hunyuan_vllm.evaluation.compare import Limits
    from hunyuan_vllm.evaluation.engines import Variant

    path, flags = _model_first(model, context.args)
    first, others = Variant.parse(a), [Variant.parse(one) for one in b]
    limits = Limits(min_agreement, max_kl, max_perplexity_ratio)

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
        broken = [problem for run, found in compared for problem in limits.broken(run.variant.label, found)]
        for problem in broken:
            say(problem)
        return BROKEN_LIMIT if broken else 0

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
    model: str = typer.Option(None, help="Name of the model; default: the first that the server has."),
    tokenizer: str = typer.Option(
        None,
        metavar="FOLDER",
        help="Folder of the tokenizer; default: the server's checkpoint, if it is on this machine.",
    ),
    api_key_file: Path = typer.Option(
        None,
        "--key-file",
        help="File (chmod 600) with the server's API key; default: VLLM_API_KEY, HUNYUAN_VLLM_API_KEY_FILE, or for a "
        "server on this machine the key that `serve` made.",
    ),
    include: Path = typer.Option(None, metavar="FOLDER", help="More tasks, as YAML files of lm-evaluation-harness."),
    output: Path = typer.Option(None, metavar="FILE", help="Write all results as JSON."),
    samples: bool = typer.Option(False, "--samples", help="Include every question and answer in --output."),
    as_json: bool = typer.Option(False, "--json", help="Print the scores as JSON instead of the table."),
) -> None:
    """Ask a running server benchmark questions, with lm-evaluation-harness (pip install 'hunyuan-vllm[eval]').

    Tasks that compare likelihoods use /v1/completions, those that generate in chat format /v1/chat/completions.

    \b
    Tasks:
      hunyuan_demo           the demo model's held-out questions
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
    from hunyuan_vllm.evaluation import tasks

    wanted = tasks.task_names(names)
    served = connect(url, find_key(url, api_key_file, os.environ), model)
    harness = tasks.Harness(served, tokenizer or str(served.tokenizer), concurrency, include)
    try:
        results = tasks.run(harness, wanted, num_fewshot, chat, limit, output, samples)
    except tasks.ServerFailed as error:
        say(str(error))
        raise typer.Exit(STOPPED) from None
    if as_json:
        print(json.dumps(tasks.scores_json(results), indent=1))
    else:
        show_table(tasks.scores_table(results))


def _model_first(model: str | None, rest: list[str]) -> tuple[str | None, list[str]]:
    """The model, if it is given, and vLLM's flags, of which the parser may have taken one for the model."""
    if model is not None and model.startswith("-"):
        return os.environ.get("MODEL_PATH", "").strip() or None, [model, *rest]
    if rest and not rest[0].startswith("-"):
        raise UserError(f"{rest[0]!r} is one argument too many: MODEL comes first, then flags that begin with --")
    return model or os.environ.get("MODEL_PATH", "").strip() or None, rest
