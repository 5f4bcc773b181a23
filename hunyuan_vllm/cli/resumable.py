"""Work that the same command goes on with: how a command says that it ended before its time."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

__all__ = ["resumable"]

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


@contextmanager
def resumable(target: Path) -> Iterator[None]:
    """Say in a line why the body, which writes `target`, ended: with exit status 130 if interrupted, 3 if the disk
    gave out. All other errors pass.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("hunyuan-vllm: stopped; the same command goes on where it was", file=sys.stderr)
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno not in DISK:
            raise
        print(
            f"hunyuan-vllm: {error.strerror} while writing {target}: the same command goes on where it was",
            file=sys.stderr,
        )
        raise typer.Exit(3) from None
