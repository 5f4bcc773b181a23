"""Which vLLM options the user gave after the command's name, so that ours give way to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from hunyuan_vllm.errors import UserError

__all__ = ["Flags"]

# The short forms of the options that the launch decides about.
ALIASES = {
    "tp": "tensor-parallel-size",
    "pp": "pipeline-parallel-size",
    "dp": "data-parallel-size",
    "cc": "compilation-config",
    "O": "optimization-level",
    "q": "quantization",
}


class Flags:
    """A user's vLLM arguments, kept as they are, with look-up by the option's long name."""

    def __init__(self, argv: Sequence[str] = ()) -> None:
        """Raises UserError if a file named by --config cannot be read."""
        self.argv = list(argv)
        self._given: dict[str, str | None] = {}
        for at, argument in enumerate(self.argv):
            if not argument.startswith("-") or argument in ("-", "--"):
                continue
            name, has_value, value = argument.partition("=")
            following = self.argv[at + 1] if at + 1 < len(self.argv) else "-"
            self._given[_long_name(name)] = value if has_value else None if following.startswith("-") else following
        if config := self._given.get("config"):
            # vLLM reads such a file as options that come before those on the command line.
            self._given = {**_read_config(config), **self._given}

    def __contains__(self, name: str) -> bool:
        return name in self._given or f"no-{name}" in self._given

    def get(self, name: str) -> str | None:
        """The option's value; None if it is absent or a switch."""
        return self._given.get(name)

    def integer(self, name: str, default: int) -> int:
        """The option's value as a number of at least 1.

        Raises:
            UserError: it is not one.
        """
        text = self.get(name)
        if text is None:
            return default
        if not text.isascii() or not text.isdigit() or int(text) < 1:
            raise UserError(f"--{name} {text} is not a number of at least 1")
        return int(text)


def _long_name(option: str) -> str:
    name = option.lstrip("-").replace("_", "-").split(".")[0]
    if option.startswith("-O") and not option.startswith("--"):
        name = "O"
    return ALIASES.get(name, name)


def _read_config(path: str) -> dict[str, str | None]:
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} is not a mapping of option names to values")
    return {
        str(name).replace("_", "-"): None if isinstance(value, bool) else str(value) for name, value in content.items()
    }
