"""`hunyuan-vllm train`, `data check` and `merge-lora`: fine-tuning"""

import json
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from hunyuan_vllm import demo
from hunyuan_vllm.cli.show import resumable
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.text import plural

BAD_LINES = 1  # exit status
SHOWN = 20  # bad lines without --json
SHOWN_CHARACTERS = 1500  # of a sample


def train(context: typer.Context) -> None:
    """Fine-tune a model: all its weights, attention, or LoRA adapters.

    Runs one process, like python -m hunyuan_vllm.train; train/train.sh starts one
    for each GPU of one node or several. --help shows the flags.
    """
    from hunyuan_vllm.train.run import main

    raise typer.Exit(main(context.args))


data = typer.Typer(no_args_is_help=True, help="Training data.")


@data.callback()
def _group() -> None:
    """Training data."""


@data.command()
def check(
    file: Path = typer.Argument(metavar="FILE", help="JSONL, one conversation per line.", show_default=False),
    model: Path = typer.Option(
        None,
        metavar="DIRECTORY",
        help="Checkpoint with the tokenizer and the chat template.",
        show_default="the demo model",
    ),
    max_seq_length: int = typer.Option(
        2048,
        "--max_seq_length",
        "--max-seq-length",
        min=1,
        help="Length in tokens at which training cuts conversations.",
    ),
    train_on_all: bool = typer.Option(
        False, "--train_on_all", "--train-on-all", help="Learn system and user messages too."
    ),
    default_system: str = typer.Option(
        None,
        "--default_system",
        "--default-system",
        help='System message of conversations that have none; "": none.',
        show_default="that of the model's published training",
    ),
    sample: int = typer.Option(None, metavar="LINE", help="Line to show.", show_default="the first good one"),
    as_json: bool = typer.Option(False, "--json", help="Print every figure, bad line and the sample as JSON."),
) -> None:
    """Check a file of training data, and count its tokens.

    Reports every bad line with its cause, the lengths of the conversations and
    how many would be cut, and shows one as it is trained on, with the learned
    parts marked ⟦so⟧. Token ids are those that a server gives the same messages.

    \b
    A line:
      {"messages": [{"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Why is the sea salty?"},
                    {"role": "assistant", "content": "Rivers carry salt."}]}
    The system message is optional; user and assistant messages alternate, and
    the assistant's comes last. Lines in the forms of ShareGPT ("conversations")
    and Alpaca ("instruction", "output"), and "prompt" with "completion", are
    converted.

    \b
    Examples:
      hunyuan-vllm data check chats.jsonl
      hunyuan-vllm data check chats.jsonl --model /models/hunyuan-large
          --max_seq_length 8192 --sample 17
      hunyuan-vllm data check chats.jsonl --json | jq '.bad[].line'

    Exit status: 0 all lines are good, 1 some are bad, 2 nothing was checked,
    130 interrupted.
    """
    from hunyuan_vllm.checkpoint import read_config
    from hunyuan_vllm.tokenizer import load_tokenizer
    from hunyuan_vllm.train.dataset import Encoding, check_report, scan
    from hunyuan_vllm.train.messages import published_system
    from hunyuan_vllm.util.progress import Progress

    model = demo.directory(model) if model is not None else demo.path()
    if not model.is_dir():
        raise UserError(f"--model {model} is not a directory: name a checkpoint, or its tokenizer's directory")
    if default_system is None:
        default_system = published_system(read_config(model)[1] if (model / "config.json").exists() else None)
    encoding = Encoding(load_tokenizer(model), max_seq_length, train_on_all, default_system)
    progress = Progress(Console(stderr=True))
    with progress.stage("reading", file.stat().st_size if file.is_file() else 0):
        found = scan(file, encoding, advance=progress.advance)
    report = check_report(file, found, encoding, sample)
    if as_json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        _show(report)
    raise typer.Exit(BAD_LINES if found.bad_count else 0)


def _show(report: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for bad in report["bad"][:SHOWN]:
        console.print(Text.assemble((f"line {bad['line']}", "bold red"), f": {bad['cause']}"))
    if (left := report["bad_lines"] - SHOWN) > 0:
        console.print(f"and {left:,} more (--json names up to 1,000)")
    if report["conversations"]:
        _show_lengths(report, console)
    if report["sample"]:
        _show_sample(report["sample"], console)
    counted, bad = plural(report["conversations"], "good conversation"), report["bad_lines"]
    style = "bold red" if bad else "green"
    console.print(f"{counted}, {plural(bad, 'bad line') if bad else 'no bad lines'}", style=style)


def _show_lengths(report: dict[str, Any], console: Console) -> None:
    limit = report["max_seq_length"]
    console.print(f"form     {', '.join(f'{name} ({count:,})' for name, count in report['forms'].items())}")
    learned = report["learned_tokens"] / report["tokens_after_truncation"]
    console.print(
        f"tokens   {report['tokens']:,}; {report['learned_tokens']:,} learned ({learned:.0%} of those that are read)"
    )
    lengths = ", ".join(f"{name} {value:,}" for name, value in report["lengths"].items())
    console.print(f"lengths  {lengths} tokens")
    cut = f"{report['truncated']:,} conversations are longer than --max_seq_length {limit:,}"
    if report["truncated"]:
        lost = report["tokens"] - report["tokens_after_truncation"]
        cut += f": {lost:,} tokens are cut off"
    if report["without_answer"]:
        cut += f"; {report['without_answer']:,} lose every answer and are skipped"
    console.print(f"cut      {cut}", style="yellow" if report["truncated"] else "")


def _show_sample(sample: dict[str, Any], console: Console) -> None:
    console.print(f"line {sample['line']}, {sample['tokens']:,} tokens, {sample['learned_tokens']:,} ⟦learned⟧:")
    text = Text()
    for part in sample["parts"]:
        style = "bold green" if part["learned"] else "dim"
        text.append(f"⟦{part['text']}⟧" if part["learned"] else part["text"], style=style)
    if len(text) > SHOWN_CHARACTERS:
        text = text[:SHOWN_CHARACTERS] + Text(f" … {len(text) - SHOWN_CHARACTERS:,} characters more")
    console.print(Text("  ") + text)


def merge_lora(
    base_model_path: Path = typer.Option(
        ..., "--base_model_path", "--base-model-path", help="Directory of the checkpoint, or demo.", show_default=False
    ),
    adapter_model_path: Path = typer.Option(
        ..., "--adapter_model_path", "--adapter-model-path", help="Directory of the adapter.", show_default=False
    ),
    output_path: Path = typer.Option(
        ..., "--output_path", "--output-path", help="Directory to write; new, or empty.", show_default=False
    ),
    save_dtype: str = typer.Option("bf16", "--save_dtype", "--save-dtype", help="bf16, fp16 or fp32."),
) -> None:
    """Merge a LoRA adapter into its checkpoint.

    Each changed weight W becomes W + scale·B·A, computed in float32 and rounded
    once; all others are unchanged. One tensor is in memory at a time. Tokenizer,
    generation settings and chat template are copied. Files are written to
    OUTPUT.partial, read back and compared; after an interruption the same
    command continues and produces the same bytes.

    \b
    Example:
      hunyuan-vllm merge-lora --base_model_path /models/hunyuan-large
          --adapter_model_path train_output/final --output_path /models/mine
      hunyuan-vllm serve /models/mine

    Adapters can also be served unmerged, several on one model:
    hunyuan-vllm serve --enable-lora --lora-modules mine=train_output/final

    \b
    Exit status: 0 OUTPUT is complete, 2 invalid input, 3 a disk
    error, 130 interrupted.
    """
    from hunyuan_vllm.quantize.source import Source
    from hunyuan_vllm.serving_command import checkpoint_command
    from hunyuan_vllm.train.merge import SAVE_DTYPES, Adapter, Merge
    from hunyuan_vllm.util.progress import Progress
    from hunyuan_vllm.util.text import gigabytes

    if save_dtype not in SAVE_DTYPES:
        raise UserError(f"--save_dtype {save_dtype}: it is {', '.join(SAVE_DTYPES)}")
    base_model_path = demo.directory(base_model_path)
    if not base_model_path.is_dir():
        raise UserError(f"--base_model_path {base_model_path} is not a directory")
    progress = Progress(Console(stderr=True))
    source = Source(base_model_path)
    adapter = Adapter(adapter_model_path, source.config)
    started = time.monotonic()
    with resumable(output_path):
        merge = Merge(source, adapter, output_path.absolute(), SAVE_DTYPES[save_dtype], progress=progress)
        progress.say(f"{len(adapter.changes):,} of {len(source.shapes):,} tensors change")
        merge.run()
    seconds = time.monotonic() - started
    progress.say(f"{output_path} holds {gigabytes(merge.nbytes)}, read back and compared; {seconds:,.0f} s")
    progress.say(f"serve it: {checkpoint_command(output_path)}")
