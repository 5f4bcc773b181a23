"""What a server offers and how much of it: routes and limits, decided at the launch, read in the server's process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["SURFACE_VARIABLE", "Surface"]

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
