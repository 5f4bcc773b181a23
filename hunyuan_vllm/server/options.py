"""What the user asked for: environment variables, vLLM's flags, routes and limits"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from hunyuan_vllm.server.vllm_parser import parse
from hunyuan_vllm.util.errors import UserError

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


SURFACE_VARIABLE = "HUNYUAN_VLLM_SURFACE"  # JSON, set by the launch: vLLM makes its middleware without arguments
MIB = 2**20
Limit = Annotated[int, Field(ge=0)]


class Surface(BaseModel):
    """Routes and limits. A limit of 0 is none.

    Attributes:
        insecure: others than this machine may use it without a key.
        admin: vLLM's administrative routes are there, for the key that may use them.
        extra_routes: paths of vLLM's that are open beside the usual ones.
        max_body: bytes of a request.
        max_prompt_tokens: tokens of a prompt; 0 leaves the model's context length.
        max_output_tokens: the most a request may ask for; 0 leaves the model's context length.
        max_sequences: sequences one request may ask for: its prompts times n.
        max_requests_per_key: generating requests a key may have under way at once.
        max_queue: sequences that may wait for a place in the engine's batch.
        ignore_unknown_fields: a field of a request that nothing reads is passed over instead of refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    insecure: bool = False
    admin: bool = False
    extra_routes: tuple[str, ...] = ()
    max_body: Limit = 16 * MIB
    max_prompt_tokens: Limit = 0
    max_output_tokens: Limit = 0
    max_sequences: Limit = 256
    max_requests_per_key: Limit = 512
    max_queue: Limit = 1024
    ignore_unknown_fields: bool = False

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Surface:
        """As the launch set it; the defaults where it did not."""
        text = environ.get(SURFACE_VARIABLE)
        return cls.model_validate_json(text) if text else cls()

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The variable that tells the server's process; none where that would find everything so by itself."""
        if self == Surface.read(inherited):
            return {}
        return {SURFACE_VARIABLE: self.model_dump_json(exclude_defaults=True)}
