"""`hunyuan-vllm quantize`: a BF16 checkpoint in, an FP8 or int8 checkpoint out."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from hunyuan_vllm import demo
from hunyuan_vllm.cli.show import resumable
from hunyuan_vllm.util.errors import UserError

if TYPE_CHECKING:
    from hunyuan_vllm.quantize.convert import Options

CALIBRATION = "Calibration (fp8, and --smooth)"
OUTLIERS = "Outliers"


def quantize(
    source: Path = typer.Argument(metavar="SRC", help="Directory of the BF16 checkpoint, or demo.", show_default=False),
    target: Path = typer.Argument(None, metavar="DST", help="Directory to write, which must not exist."),
    scheme: str = typer.Option(..., help="fp8, int8 or int8-w8a8; see below.", show_default=False),
    calibration: Path = typer.Option(
        None,
        metavar="FILE",
        help="UTF-8 text, or .jsonl with one chat per line; default: a short Chinese and English text of ours.",
        rich_help_panel=CALIBRATION,
    ),
    calibration_tokens: int = typer.Option(
        8192, min=1, help="Maximum number of tokens to read from it.", rich_help_panel=CALIBRATION
    ),
    headroom: float = typer.Option(
        2.0,
        min=1,
        max=64,
        help="Static FP8 scales cover this many times the maximum that calibration saw.",
        rich_help_panel=CALIBRATION,
    ),
    smooth: float = typer.Option(
        None,
        min=0,
        max=1,
        metavar="ALPHA",
        help="Strength of SmoothQuant, which moves outlying input channels into the weights; 0 to 1, usually 0.5.",
        rich_help_panel=OUTLIERS,
    ),
    plan: bool = typer.Option(
        False,
        "--plan",
        help="Print the disk space and memory that a run needs, and stop. SRC may be a config.json, or "
        "hunyuan-large for the published one.",
    ),
) -> None:
    """Convert a checkpoint to FP8 or int8.

    \b
    Schemes:
      fp8         FP8 weights, inputs and cache, one scale per tensor, in the
                  layout of vLLM's fp8 method (AutoFP8); input scales come from
                  running the network over a calibration text
      int8        int8 weights, one scale per output channel, in the layout of
                  compressed-tensors (pack-quantized)
      int8-w8a8   the same, and int8 inputs, scaled while serving
                  (int-quantized)
    Attention, MLPs and experts are quantised; router, norms, embeddings and
    head are not.

    \b
    Examples:
      hunyuan-vllm quantize /models/hunyuan-large /models/int8 --scheme int8
      hunyuan-vllm quantize /models/hunyuan-large /models/fp8
          --scheme fp8 --calibration chats.jsonl --calibration-tokens 65536
      hunyuan-vllm quantize hunyuan-large --scheme fp8 --plan

    \b
    A line of a .jsonl file is one of
      {"messages": [{"role": "user", "content": "Hello"}, ...]}
      {"text": "..."}

    \b
    One tensor is in memory at a time. Everything written is read back and
    compared with its source; the errors are in DST/quantize_report.json. Files
    are written to DST.partial: after an interruption, the same command continues.

    \b
    Exit status: 0 DST is complete, 2 invalid input, 3 a disk
    error, 130 interrupted.
    """
    import torch

    from hunyuan_vllm.quant.schemes import WRITTEN, find_scheme
    from hunyuan_vllm.quantize.convert import Conversion, Options
    from hunyuan_vllm.quantize.source import Source
    from hunyuan_vllm.quantize.verify import show
    from hunyuan_vllm.serving_command import checkpoint_command
    from hunyuan_vllm.util.progress import Progress
    from hunyuan_vllm.util.text import gigabytes

    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = Options(find_scheme(scheme, WRITTEN).name, smooth, calibration_tokens, headroom, device=device)
    source = demo.directory(source)
    if plan:
        return _show_plan(source, options)
    if target is None:
        raise UserError("give DST, the directory to write, after SRC; or add --plan to see what the run needs")
    progress = Progress(Console(stderr=True))
    with resumable(target):
        report = Conversion(Source(source), target.absolute(), options, calibration, progress).run()
    show(report, progress.console)
    if (calibrated := report["calibration"]) and (idle := calibrated["idle_experts"]):
        progress.say(
            f"{len(idle)} experts were routed few of the {calibrated['tokens']:,} calibration tokens, "
            f"{sum(not one['routed'] for one in idle)} of them none: they were shown the tokens most likely for them "
            "(a longer --calibration text reaches more)"
        )
    progress.say(
        f"{target} holds {gigabytes(report['written_bytes'])}, from {gigabytes(report['source_bytes'])}; "
        "every tensor was read back; errors by projection are in quantize_report.json"
    )
    progress.say(f"serve it: {checkpoint_command(target, options.scheme)}")


def _show_plan(source: Path, options: "Options") -> None:
    from hunyuan_vllm.plan.model import PUBLISHED, open_planned
    from hunyuan_vllm.quantize.convert import Plan
    from hunyuan_vllm.quantize.source import read_bf16_config

    given = str(source)
    published = given in PUBLISHED and not source.exists()
    config = open_planned(given).config if published else read_bf16_config(source)[1]
    print(f"{options.scheme}, {config.num_hidden_layers} layers, smooth {options.smooth}")
    print("\n".join(Plan.of(config, options).lines()))
