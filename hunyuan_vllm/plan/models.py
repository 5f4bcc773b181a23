"""The network to plan for: a checkpoint's config.json, or the published model's, which comes with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hunyuan_vllm import demo
from hunyuan_vllm.checkpoint import missing_config
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.errors import UserError
from hunyuan_vllm.quant.formats import Format, read_format

__all__ = ["PUBLISHED", "PlannedModel", "open_planned"]

PUBLISHED = "hunyuan-large"
UNQUANTISED = ("lm_head", "embed_tokens", "wg", "gate")  # modules that no scheme here quantises


@dataclass(frozen=True)
class PlannedModel:
    """A network, of which only the config need exist.

    Attributes:
        name: what the user called it.
        format: how the checkpoint stores its weights.
    """

    name: str
    config: HunYuanConfig
    format: Format = Format()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a plan does not account for."""
        names = self.format.ignored.entries if self.format.ignored else []
        left = [name for name in names if name.rsplit(".", 1)[-1].strip("*") not in UNQUANTISED]
        if not left:
            return ()
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        return (f"the checkpoint leaves {left[0]}{more} unquantised; the weights here are counted as if it did not",)


def open_planned(given: str) -> PlannedModel:
    """`hunyuan-large`, `demo`, a checkpoint's folder, or a config.json alone: weights need not be there yet.

    Raises:
        UserError: there is no such config, or it is not a Hunyuan network's.
    """
    if given == PUBLISHED:
        path = Path(__file__).parent / "data" / PUBLISHED / "config.json"
    elif given == demo.NAME:
        path = demo.path() / "config.json"
    else:
        path = Path(given).expanduser()
        if path.is_dir() and not (path / "config.json").exists():
            raise UserError(f"--model {given} {': '.join(missing_config(path))}")
        path = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"--model {given}: {path} cannot be read ({error.strerror}): name a folder with a config.json, that file, "
            f"or {PUBLISHED}"
        ) from None
    except ValueError as error:
        raise UserError(f"--model {given}: {path} is not JSON ({error}): download it again") from None
    if not isinstance(fields, dict) or fields.get("model_type") != HunYuanConfig.model_type:
        kind = fields.get("model_type") if isinstance(fields, dict) else None
        raise UserError(f"--model {given} has model_type {kind!r}; this planner knows 'hunyuan' (Hunyuan-Large)")
    try:
        config = HunYuanConfig.from_dict(fields)
        form = read_format(fields, path.parent)
    except ValueError as error:
        raise UserError(f"--model {given}: {error}") from None
    return PlannedModel(given, config, form)
