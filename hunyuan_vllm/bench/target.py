"""The server that is measured: its model, its tokenizer, and what it says of its machine and options."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from hunyuan_vllm.chat.client import Client, Model
from hunyuan_vllm.errors import UserError

__all__ = ["MACHINE", "Target", "look"]

MACHINE = ("device", "devices", "cores")
OURS, STOCK = "hunyuan_server_info", "vllm:cache_config_info"
STOCK_TOLD = ("cache_dtype", "enable_prefix_caching", "gpu_memory_utilization", "num_gpu_blocks")


@dataclass(frozen=True)
class Target:
    """Attributes:
    url: without a path.
    tokenizer: folder with the model's tokenizer.
    machine: what the server runs on; empty if it does not say.
    options: how it is set up, as far as it says.
    """

    url: str
    model: Model
    tokenizer: Path
    machine: dict[str, str]
    options: dict[str, str]


def look(client: Client, model: Model, tokenizer: Path | None, machine: str | None) -> Target:
    """Ask a server about itself.

    Args:
        tokenizer: given by the user, for a server whose files are not here.
        machine: the user's name for the server's machine, instead of what it says.

    Raises:
        UserError: it does not answer, or the tokenizer is not to be found.
    """
    told = _labels(client.read("/metrics"))
    options = told.get(OURS) or {name: told.get(STOCK, {}).get(name, "?") for name in STOCK_TOLD}
    options.setdefault("vllm", str(json.loads(client.read("/version")).get("version")))
    found = {name: options.pop(name) for name in MACHINE if name in options}
    if machine:
        found = {"device": machine}
    return Target(client.url, model, _tokenizer(model, tokenizer), found, options)


def _labels(metrics: str) -> dict[str, dict[str, str]]:
    families = text_string_to_metric_families(metrics)
    return {sample.name: sample.labels for family in families for sample in family.samples}


def _tokenizer(model: Model, given: Path | None) -> Path:
    folder = given or Path(model.root or "")
    if (folder / "tokenizer_config.json").is_file():
        return folder
    if given:
        raise UserError(f"--tokenizer {given} is no folder with a tokenizer_config.json")
    raise UserError(
        f"the server's checkpoint {model.root} is not on this machine: name a folder with its tokenizer (hy.tiktoken, "
        "tokenizer_config.json, config.json) with --tokenizer"
    )
