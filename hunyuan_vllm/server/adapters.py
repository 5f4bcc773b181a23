"""The adapters that a server is given at start (--lora-modules), looked at before the model is loaded for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.server.flags import Flags
from hunyuan_vllm.server.model_source import HUB_NAME

if TYPE_CHECKING:
    from hunyuan_vllm.config import HunYuanConfig

__all__ = ["check_adapters"]

MAX_LORA_RANK = 16  # vLLM's, where --max-lora-rank does not say


def check_adapters(flags: Flags, config: HunYuanConfig | None, cpu: bool) -> None:
    """Refuse adapters that would be served in part or not at all. Those on the hub are left to vLLM.

    Raises:
        UserError: the message names the adapter.
    """
    given = flags.get("lora-modules")
    if not given:
        return
    from hunyuan_vllm.adapter import check_adapter  # with transformers, which takes seconds

    if "enable-lora" not in flags:
        raise UserError("--lora-modules needs --enable-lora beside it")
    for item in given:
        name, path = _name_and_path(item)
        folder = Path(path).expanduser()
        if config is None or not folder.exists() and HUB_NAME.fullmatch(path):
            continue
        try:
            check_adapter(folder, config, cpu, flags.integer("max-lora-rank", MAX_LORA_RANK))
        except UserError as error:
            raise UserError(f"--lora-modules {name}: {error}") from None


def _name_and_path(item: str) -> tuple[str, str]:
    """As vLLM reads NAME=PATH, or a JSON object with both."""
    if "=" in item and "," not in item:
        name, _, path = item.partition("=")
        return name, path
    try:
        fields = json.loads(item)
        return fields["name"], fields["path"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--lora-modules {item} is not NAME=FOLDER, nor a JSON object with name and path") from None
