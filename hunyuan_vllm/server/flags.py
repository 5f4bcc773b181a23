"""Which vLLM options the user gave after the command's name, so that ours give way to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.server.vllm_parser import parse

__all__ = ["Flags"]

MODEL = ("model_tag", "model")


class Flags:
    """A user's vLLM arguments as vLLM's parser understands them, by the option's long name.

    Attributes:
        argv: the arguments without the model.
        model: the model among them, or in a file named by --config; None if there is none.
    """

    def __init__(self, argv: Sequence[str] = (), own_options: Sequence[str] = ()) -> None:
        """Raises UserError if vLLM would not take them; `own_options` are names that may have been meant, too."""
        self.argv = list(argv)
        self._given = parse(self.argv, own_options)
        models = {name: self._given.pop(name) for name in MODEL if name in self._given}
        if len(set(models.values())) > 1:
            raise UserError(f"the model is given twice: {' and '.join(models.values())}; leave one out")
        self.model: str | None = next(iter(models.values()), None)
        for name in models:
            self._leave_out(name)

    def __contains__(self, name: str) -> bool:
        return name.replace("-", "_") in self._given

    def get(self, name: str) -> Any:
        """The option's value; None if it is absent."""
        return self._given.get(name.replace("-", "_"))

    def integer(self, name: str, default: int) -> int:
        """The option's value as a number of at least 1.

        Raises:
            UserError: it is not one.
        """
        value = self.get(name)
        if value is None:
            return default
        if int(value) < 1:
            raise UserError(f"--{name} {value} is not a number of at least 1")
        return int(value)

    def _leave_out(self, name: str) -> None:
        """Take a model's words out of `argv`: those without which vLLM would understand the same, but for the model.

        None are there to take if the model is named in a file.
        """
        wanted = {key: value for key, value in parse(self.argv).items() if key != name}
        for start in range(len(self.argv)):
            for words in (1, 2):
                rest = [*self.argv[:start], *self.argv[start + words :]]
                try:
                    same = parse(rest) == wanted
                except UserError:
                    continue
                if same:
                    self.argv = rest
                    return
