"""What the user asked for: vLLM's options, and the routes and limits of the API"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hunyuan_vllm.server.vllm_parser import parse
from hunyuan_vllm.util.errors import UserError

MODEL = ("model_tag", "model")


class Flags:
    """vLLM's options as its own parser understands them, by their long names.

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
            self._remove(name)

    def __contains__(self, name: str) -> bool:
        return name.replace("-", "_") in self._given

    def get(self, name: str) -> Any:
        """The option's value; None if it is absent."""
        return self._given.get(name.replace("-", "_"))

    def integer(self, name: str, default: int) -> int:
        """The option's value as a number of at least 1."""
        value = self.get(name)
        if value is None:
            return default
        if int(value) < 1:
            raise UserError(f"--{name} {value} is not a number of at least 1")
        return int(value)

    def _remove(self, name: str) -> None:
        """Remove the words that name the model from `argv`: those without which vLLM parses the rest alike.

        There are none if a --config file names the model.
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


POLICY_VARIABLE = "HUNYUAN_VLLM_API_POLICY"  # JSON; vLLM gives a middleware no arguments
MIB = 2**20
Limit = Annotated[int, Field(ge=0)]


class ApiPolicy(BaseModel):
    """The routes a server has, its limits (0 is none), and whether it needs a key.

    Attributes:
        insecure: it may be reached from other machines without a key.
        admin: vLLM's administrative routes are served, to the key that may use them.
        extra_routes: routes of vLLM served beside the usual ones.
        max_body: bytes of a request.
        max_prompt_tokens: tokens of a prompt; 0 leaves the model's context length.
        max_output_tokens: tokens a request may ask for; 0 leaves the model's context length.
        max_sequences: sequences one request may ask for: its prompts times n.
        max_requests_per_key: generating requests of one key in flight at once.
        max_queue: sequences that may wait for a place in the engine's batch.
        ignore_unknown_fields: unknown fields of a request are ignored instead of refused.
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
    def read(cls, environ: Mapping[str, str]) -> Self:
        """The policy in the environment, else the default one."""
        try:
            text = environ.get(POLICY_VARIABLE)
            return cls.model_validate_json(text) if text else cls()
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(["", *map(str, problem["loc"])])
            raise UserError(f"{POLICY_VARIABLE}{place}: {problem['msg']}") from None

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """The variable for the server's process, unless it would read the same policy without."""
        if self == ApiPolicy.read(inherited):
            return {}
        return {POLICY_VARIABLE: self.model_dump_json(exclude_defaults=True)}
