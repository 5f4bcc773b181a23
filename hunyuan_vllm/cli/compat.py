"""`hunyuan-vllm compat`: compare all we use of vLLM with a vLLM that is installed, or only unpacked."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import typer

from hunyuan_vllm.util.errors import UserError

__all__ = ["compat"]


def compat(
    folder: Path | None = typer.Argument(
        None, help="Folder that holds the package vllm, such as an unpacked wheel; default: the installed vLLM."
    ),
) -> None:
    """Check that a vLLM has every symbol, keyword and member this package uses.

    Reads source text only. Exit status 1 if something is missing.

    \b
    Examples:
      hunyuan-vllm compat
      pip download --no-deps vllm==0.33.0 && unzip -q vllm-0.33.0-*.whl -d vllm-0.33
      hunyuan-vllm compat vllm-0.33
    """
    from hunyuan_vllm.compat import check_symbols
    from hunyuan_vllm.vllm_surface import USED

    root = folder or _installed()
    if not (root / "vllm" / "__init__.py").is_file():
        raise UserError(f"{root} holds no package vllm: name the folder that an unpacked wheel's vllm/ lies in")
    problems = check_symbols(root)
    for problem in problems:
        print(problem)
    print(f"{len(USED)} symbols checked in {root / 'vllm'}: {len(problems)} problems")
    raise typer.Exit(1 if problems else 0)


def _installed() -> Path:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise UserError("vLLM is not installed: name the folder of an unpacked wheel")
    return Path(spec.origin).parents[1]
