"""Unix sockets that killed processes of vLLM leave in the temporary folder, by the names that vLLM gives them."""

from __future__ import annotations

import os
import re
import socket
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["remove_deserted_sockets"]

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def remove_deserted_sockets(environ: Mapping[str, str] = os.environ) -> None:
    """Remove those of this user on which no process listens any more."""
    for entry in os.scandir(environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir()):
        if UUID.fullmatch(entry.name):
            try:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid() and _is_deserted(entry.path):
                    Path(entry.path).unlink(missing_ok=True)
            except OSError:  # gone meanwhile
                continue


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
