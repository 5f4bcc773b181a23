"""Sampling parameters of a chat, with the values published with Hunyuan-Large (its generation_config.json)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hunyuan_vllm.errors import UserError

__all__ = ["Sampling"]


class Sampling(BaseModel):
    """What is sent with each question; None leaves it to the server."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    temperature: float = Field(default=0.7, ge=0, le=2)
    top_p: float = Field(default=0.6, gt=0, le=1)
    top_k: int = Field(default=20, ge=0)
    repetition_penalty: float = Field(default=1.05, gt=0, le=2)
    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=0)

    def set(self, name: str, value: str) -> None:
        """Set one as it was typed; "default" sets it back.

        Raises:
            UserError: there is none of that name, or it cannot be that.
        """
        fields = type(self).model_fields
        if name not in fields:
            raise UserError(f"{name} is none of {', '.join(fields)}")
        try:
            setattr(self, name, fields[name].default if value == "default" else value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Input ")
            raise UserError(f"{name}={value}: it {reason}") from None

    def request(self) -> dict[str, float | int]:
        """The fields of a request."""
        return self.model_dump(exclude_none=True)
