"""What a run needs before it costs anything: the extra's libraries, and a folder to write to."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from hunyuan_vllm.errors import UserError

__all__ = ["need_extra", "need_writable"]

EXTRA: Final = ("accelerate", "peft", "tensorboard", "matplotlib")


def need_extra(deepspeed: bool = False) -> None:
    """Check that the libraries of fine-tuning are installed.

    Raises:
        UserError: one is not.
    """
    wanted = (*EXTRA, "deepspeed") if deepspeed else EXTRA
    if missing := [name for name in wanted if find_spec(name) is None]:
        raise UserError(
            f"fine-tuning needs {', '.join(missing)}: sh deploy/setup_env.sh --train, "
            "or pip install 'hunyuan-vllm[train]'"
        )


def need_writable(output: Path) -> None:
    """Make the output folder, and write to it once.

    Raises:
        UserError: that is not possible.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(f"--output_dir {output} cannot be written to ({error.strerror}): name another folder") from None
