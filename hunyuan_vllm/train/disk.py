"""A disk that gives out while something is saved: in one line, with what is still whole."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.train.whole import checkpoints

__all__ = ["DiskError", "saving"]

ERRNOS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
# torch and safetensors write by C++ and Rust, and raise errors of their own.
WORDS = re.compile(
    r"no space left|disk quota|file too large|os error (5|27|28|30|122)|file write failed|iostream error", re.I
)


class DiskError(UserError):
    """What could not be written, and why; exit status 3."""


@contextmanager
def saving(what: str, output: Path) -> Iterator[None]:
    """Turn a full or broken disk in the body into one line.

    Raises:
        DiskError: `what` could not be written; the message says what to go on from.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := _reason(error)) is None:
            raise
        whole = checkpoints(output)
        rest = (
            f"{whole[-1].name} is whole: make room and go on with --resume_from_checkpoint last"
            if whole
            else "there is no checkpoint yet: make room, or name another --output_dir, and start again"
        )
        raise DiskError(f"{what} could not be written to {output} ({reason}); {rest}") from error


def _reason(error: BaseException | None) -> str | None:
    """What a disk did that made this error, or one that this came of; None where no disk did."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in ERRNOS:
            return error.strerror
        if found := WORDS.search(str(error)):
            return found[0].lower()
        error = error.__cause__ or error.__context__
    return None
