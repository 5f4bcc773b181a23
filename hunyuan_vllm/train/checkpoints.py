"""Checkpoints of a run: written completely or not at all, and found for resuming"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import sync

STAGING: Final = ".saving"
"""Where an output directory holds a checkpoint until it is complete; what a killed run leaves there is never read."""

STATE: Final = "trainer_state.json"
NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints in an output directory, oldest first."""
    found = [(int(match[1]), path) for path in output.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def resume_directory(given: str, output: Path) -> Path:
    """The checkpoint that `--resume_from_checkpoint` names: a directory, or `last` (or `True`) for the newest."""
    option = f"--resume_from_checkpoint {given}"
    if given.lower() not in ("last", "true"):
        if not Path(given).is_dir():
            raise UserError(f"{option} is not a directory: name a checkpoint-N, or `last`")
        return check_checkpoint(Path(given))
    if not (found := checkpoints(output)):
        raise UserError(f"{option}: {output} has no checkpoint-N; leave the flag out to start")
    return check_checkpoint(found[-1])


def check_checkpoint(directory: Path) -> Path:
    """`directory`, if it holds everything needed to resume."""
    if STAGING in directory.absolute().parts:
        raise UserError(f"{directory} is incomplete: resume from a checkpoint-N beside {STAGING}")
    patterns = {
        "state": (STATE,),
        "weights": ("*.safetensors", "global_step*"),
        "optimiser state": ("optimizer.pt", "global_step*"),
        "random state": ("rng_state*.pth",),
    }
    for what, names in patterns.items():
        if not any(next(directory.glob(name), None) for name in names):
            raise UserError(f"{directory} is not a checkpoint to resume from: it has no {what} ({' or '.join(names)})")
    try:
        json.loads((directory / STATE).read_text())
    except ValueError:
        raise UserError(f"{directory} is damaged: {STATE} is not JSON; resume from another checkpoint") from None
    return directory


def move_into_place(staged: Path, final: Path) -> None:
    """Flush a complete directory to the disk and rename it to `final`, replacing what has that name."""
    for parent, _, files in os.walk(staged):
        for file in files:
            sync(Path(parent, file))
        sync(Path(parent))
    old = staged.with_name(staged.name + ".old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(staged, final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_old(output: Path, limit: int | None) -> list[Path]:
    """Delete the oldest checkpoints beyond `limit`, each renamed first, and return them."""
    gone = checkpoints(output)[:-limit] if limit else []
    for directory in gone:
        aside = output / STAGING / f"{directory.name}.old"
        aside.parent.mkdir(exist_ok=True)
        os.replace(directory, aside)
        shutil.rmtree(aside, ignore_errors=True)
    return gone


ERRNOS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
# torch and safetensors write from C++ and Rust, with errors of their own.
WORDS = re.compile(
    r"no space left|disk quota|file too large|os error (5|27|28|30|122)|file write failed|iostream error", re.I
)


class DiskError(UserError):
    """A full or broken disk."""

    status = 3


@contextmanager
def saving(what: str, output: Path) -> Iterator[None]:
    """Raise one clear error where the body meets a full or broken disk.

    Raises:
        DiskError: `what` could not be written; the message names the checkpoint to resume from.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := _reason(error)) is None:
            raise
        if complete := checkpoints(output):
            rest = f"{complete[-1].name} is complete: free space and continue with --resume_from_checkpoint last"
        else:
            rest = "there is no checkpoint yet: free space, or name another --output_dir, and start again"
        raise DiskError(f"{what} could not be written to {output} ({reason}); {rest}") from error


def _reason(error: BaseException | None) -> str | None:
    """The disk failure that caused an error, directly or through its causes; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in ERRNOS:
            return error.strerror
        if found := WORDS.search(str(error)):
            return found[0].lower()
        error = error.__cause__ or error.__context__
    return None
