"""The temporary folders of a server: there when it starts, and without what its killed processes left in them."""

from __future__ import annotations

import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

__all__ = ["make_folders", "remove_deserted_sockets", "rendezvous_file"]

SOCKETS = "VLLM_RPC_BASE_PATH"
FOLDERS = ("TMPDIR", SOCKETS)
# The file over which a server's workers find each other, as vLLM's log names it.
RENDEZVOUS = re.compile(r"\bdistributed_init_method=file://(/\S*/vllm_dist_[0-9a-f]{32})\b")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def make_folders(environ: Mapping[str, str]) -> Iterator[str]:
    """Make the folders that `environ` names and that are not there (any more).

    Yields:
        a line for each: that it has been made, or why it cannot be.
    """
    for name in FOLDERS:
        folder = environ.get(name)
        if folder and not os.path.isdir(folder):
            try:
                os.makedirs(folder, mode=0o700)
                yield f"{name}={folder} was not there and has been made"
            except OSError as error:
                yield f"{name}={folder} is not a directory and cannot be made: {error.strerror}"


def rendezvous_file(line: str) -> Path | None:
    """The file that this line of a server's log names, if it is the one over which its workers find each other.

    No process of vLLM removes it when the server ends.
    """
    match = RENDEZVOUS.search(line)
    return Path(match[1]) if match else None


def remove_deserted_sockets(environ: Mapping[str, str] = os.environ) -> None:
    """Remove this user's sockets on which no process listens any more, by the names that vLLM gives them."""
    with suppress(OSError):  # the folder is gone
        for entry in os.scandir(environ.get(SOCKETS) or tempfile.gettempdir()):
            if UUID.fullmatch(entry.name):
                with suppress(OSError):  # the socket is gone
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid() and _is_deserted(entry.path):
                        Path(entry.path).unlink(missing_ok=True)


def _is_deserted(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except BlockingIOError:  # somebody listens, with a full queue
            pass
    return False
