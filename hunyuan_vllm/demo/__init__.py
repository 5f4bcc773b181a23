"""The demo model: a small trained checkpoint of the Hunyuan-Large architecture, shipped with the package."""

from pathlib import Path

NAME = "demo"  # what commands call it, where a checkpoint's directory may be named


def path() -> Path:
    return Path(__file__).parent


def directory(given: Path) -> Path:
    """The directory that `given` names: the demo model's for `demo`, unless there is one of that name."""
    return path() if str(given) == NAME and not given.exists() else given
