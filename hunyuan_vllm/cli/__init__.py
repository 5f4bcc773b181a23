"""The command `hunyuan-vllm`: one module a subcommand, imported when that subcommand runs."""

import contextlib
import importlib.util
import os
import platform
import sys
from importlib import metadata
from typing import Any

import typer
from typer.core import TyperGroup

from hunyuan_vllm import __version__
from hunyuan_vllm.cli.batch import batch
from hunyuan_vllm.cli.bench import app as bench
from hunyuan_vllm.cli.check import check
from hunyuan_vllm.cli.cluster import app as cluster
from hunyuan_vllm.cli.doctor import doctor
from hunyuan_vllm.cli.eval import app as evaluation
from hunyuan_vllm.cli.plan import plan
from hunyuan_vllm.cli.quantize import quantize
from hunyuan_vllm.cli.serve import serve
from hunyuan_vllm.cli.train import data, merge_lora, train
from hunyuan_vllm.plugin import GET_VLLM, installed_vllm
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.streams import prepare_output, say


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run the command; one that is interrupted ends in one line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="hunyuan-vllm",
    cls=_Commands,
    help="Tencent Hunyuan-Large on vLLM.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        engine = installed_vllm()
        versions = [" ".join(engine) if engine else "no vLLM"]
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"torch {metadata.version('torch')}")
        print(f"hunyuan-vllm {__version__} ({', '.join(versions)}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the versions: ours, vLLM's, torch's."
    ),
) -> None:
    """Serve the model with an OpenAI-compatible API, or run it over files."""


# vLLM's own flags pass through: these commands know only their few.
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=PASS_THROUGH)(serve)
app.command(context_settings=PASS_THROUGH)(batch)
app.command(context_settings={**PASS_THROUGH, "help_option_names": []})(train)
app.command()(plan)
app.add_typer(bench, name="bench")
app.add_typer(cluster, name="cluster")
app.add_typer(data, name="data")
app.add_typer(evaluation, name="eval")
app.command()(check)
app.command()(doctor)
app.command()(quantize)
app.command()(merge_lora)


# Libraries that only some commands need → how to get them.
EXTRAS = dict.fromkeys(("torch", "vllm"), GET_VLLM) | dict.fromkeys(
    ("accelerate", "deepspeed", "peft", "tensorboard"), "pip install 'hunyuan-vllm[train]'"
)


def main() -> None:
    """Entry point: a `UserError` is one line on stderr, and its exit status; so is an extra that is not installed."""
    if importlib.util.find_spec("torch") is None:
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it warns of that in every command
    prepare_output()
    try:
        app()
    except UserError as error:
        say(str(error))
        sys.exit(error.status)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        say(f"this command needs {error.name}, which is not installed: {EXTRAS[error.name]}")
        sys.exit(2)
