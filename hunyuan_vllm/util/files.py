"""Files that appear complete or not at all, and files that only their owner can read"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hunyuan_vllm.util.errors import UserError


def sync(path: Path) -> None:
    """Flush a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to; when the block ends it becomes `file`, unless there was an error."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_private(file: Path, text: str) -> bool:
    """Write `file` with mode 0600 unless it holds `text` already; whether anything changed, its mode included."""
    try:
        private = stat.S_IMODE(file.stat().st_mode) == 0o600
        if file.read_text() == text:
            if not private:
                file.chmod(0o600)
            return not private
    except (OSError, UnicodeDecodeError):
        pass  # it is not there, or its owner has taken his own right to read it
    try:
        beside = _beside(file, text)
        beside.replace(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None
    return True


def make_private(file: Path, text: str) -> bool:
    """Write `file` with mode 0600 if there is none; whether it was made. Of two who try at once, one makes it."""
    if file.exists():
        return False
    try:
        beside = _beside(file, text)
        try:
            os.link(beside, file)
        except FileExistsError:
            return False
        finally:
            beside.unlink()
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None
    return True


def read_private(file: Path) -> str | None:
    """Its text; None where there is no such file."""
    try:
        status = file.stat()
        text = file.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}") from None
    # As ssh has it: one's own file must be private; a secret that the system mounts belongs to another user.
    if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & 0o077:
        raise UserError(f"{file} is open to other users: chmod 600 {file}")
    return text


def _beside(file: Path, text: str) -> Path:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as output:
        output.write(text)
    return beside
