"""The demo model: a small trained checkpoint of the Hunyuan-Large architecture, shipped with the package."""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Folder of the checkpoint."""
    return Path(__file__).parent
