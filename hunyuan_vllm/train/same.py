"""Whether the nodes of a run have the same code, libraries, checkpoint and data: looked at on each, then compared."""

from __future__ import annotations

import hashlib
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Final

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.findings import some

__all__ = ["compare", "facts"]

PACKAGES: Final = ("torch", "transformers", "accelerate", "peft", "deepspeed", "tokenizers")
EDGE: Final = 1 << 20  # bytes that are read at each end of a file of weights, which is too large to be read whole
ABSENT: Final = "absent"


def facts(paths: Sequence[str]) -> dict[str, str]:
    """What must agree: name → a short text. `paths` are files, read whole, and folders of checkpoints."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ABSENT
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        found[f"hunyuan_vllm/{file.relative_to(package)}"] = _digest(file)
    for path in map(Path, paths):
        if path.is_dir():
            files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
            found |= {str(file): _digest(file) for file in files}
        else:
            found[str(path)] = _digest(path)
    return found


def compare(nodes: Mapping[str, Mapping[str, str]]) -> None:
    """Compare the facts of all nodes.

    Raises:
        UserError: something is not the same everywhere; the message names it, and who has what.
    """
    names = sorted({name for known in nodes.values() for name in known})
    differing: dict[str, dict[str, list[str]]] = {}
    for name in names:
        who = defaultdict(list)
        for node, known in nodes.items():
            who[known.get(name, ABSENT)].append(node)
        if len(who) > 1:
            differing[name] = dict(who)
    if not differing:
        return
    first = next(iter(differing))
    kinds = "; ".join(f"{what} on {', '.join(who)}" for what, who in differing[first].items())
    rest = f" (also {some(list(differing)[1:])})" if len(differing) > 1 else ""
    raise UserError(
        f"the nodes are not alike: {first} is {kinds}{rest}: bring the same checkout, environment, checkpoint and data "
        "to each, at the same paths"
    )


def _digest(file: Path) -> str:
    """Size and part of a SHA-256 of a file: of all of it, or of both ends where it holds weights."""
    try:
        size = file.stat().st_size
        sha = hashlib.sha256()
        with file.open("rb") as content:
            if file.suffix == ".safetensors" and size > 2 * EDGE:
                sha.update(content.read(EDGE))
                content.seek(-EDGE, 2)
                sha.update(content.read(EDGE))
            else:
                while chunk := content.read(1 << 22):
                    sha.update(chunk)
    except OSError:
        return ABSENT
    return f"{size} bytes {sha.hexdigest()[:12]}"
