"""Runs on a host: where on it secrets can be read. {name: secret} comes as JSON, [name, place] pairs go as JSON.

Places: command lines and environments of processes, files that Ray, vLLM or a server may have written, and the memory
of Ray's workers, which other users' code may share.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

DIRECTORIES = ("/tmp", "/dev/shm", "/var/tmp", "/var/log", Path.home() / ".cache", Path.home() / ".config" / "vllm")
WORKER = "ray::RayWorkerProc"


def processes() -> Iterator[tuple[Path, str]]:
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            yield directory, (directory / "cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:
            continue


def places() -> Iterator[tuple[str, bytes]]:
    for directory, name in processes():
        for file in ("cmdline", "environ"):
            try:
                yield f"{file} of {name}", (directory / file).read_bytes()
            except OSError:
                continue
        if name.startswith(WORKER):
            yield from memory(directory, name)
    for top in DIRECTORIES:
        for path in Path(top).rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield str(path), path.read_bytes()


def memory(directory: Path, name: str) -> Iterator[tuple[str, bytes]]:
    """What a process could print: every writable part of its memory that it has written to."""
    with open(directory / "mem", "rb", buffering=0) as content:
        for start, end in written(directory / "smaps"):
            try:
                content.seek(start)
                yield f"memory of {name}", content.read(end - start)
            except (OSError, OverflowError, ValueError):
                continue


def written(smaps: Path) -> Iterator[tuple[int, int]]:
    area = rights = ""
    for line in smaps.read_text().splitlines():
        first, second = line.split()[:2]
        if not first.endswith(":"):
            area, rights = first, second
        elif first in ("Rss:", "Swap:") and second != "0" and rights.startswith("rw"):
            start, end = area.split("-")
            yield int(start, 16), int(end, 16)
            rights = ""  # once is enough


secrets = {name: secret.encode() for name, secret in json.load(sys.stdin).items()}
found = {(name, place) for place, content in places() for name, secret in secrets.items() if secret in content}
names = sorted({name for _, name in processes() if name.startswith(("ray::", "VLLM"))})
print(json.dumps({"found": sorted(found), "processes": names}))
