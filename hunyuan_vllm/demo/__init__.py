"""The demo model: a small trained checkpoint of the Hunyuan-Large architecture, shipped with the package."""

from pathlib import Path

__all__ = ["NAME", "path"]

NAME = "demo"  # what commands call it, where a checkpoint's folder may be named


def path() -> Path:
    """Folder of the checkpoint."""
    return Path(__file__).parent
