"""Files that appear complete or not at all, and outlive a power cut."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hunyuan_vllm.errors import UserError


def sync(path: Path) -> None:
    """Flush a file's bytes, or a directory's entries, to the disk.

    Raises:
        OSError: the disk did not take it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to. What is there when the block ends becomes `file`; after an error, nothing does.

    Raises:
        UserError: it cannot be written.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
