"""config.json and generation_config.json of a checkpoint"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hunyuan_vllm.checkpoint import PUBLISHED_AT
from hunyuan_vllm.config import ARCHITECTURES, CONFIG_CLASSES, HunYuanConfig
from hunyuan_vllm.layout import expected_tensors, tensor_parallel_sizes
from hunyuan_vllm.quant.formats import Format, UnservedFormat
from hunyuan_vllm.quant.quantization_config import read_format
from hunyuan_vllm.util.findings import Section

AGAIN = f"download config.json again; published: {PUBLISHED_AT}"
OTHERS_DEPEND_ON = {"hidden_size", "num_attention_heads", "num_hidden_layers"}


@dataclass
class ConfigFile:
    """What config.json says: as it is, as a network, and in which format the weights are; None where it does not."""

    fields: dict[str, Any] = field(default_factory=dict)
    network: HunYuanConfig | None = None
    format: Format | None = None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a file.

    Raises:
        ValueError: it is not one, or there is no such file; the message ends the sentence "PATH …".
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("is not there") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise ValueError("is not a JSON object")
    return content


def check_config(folder: Path, section: Section) -> ConfigFile:
    """Read and check it."""
    found = ConfigFile()
    try:
        found.fields = read_object(folder / "config.json")
    except ValueError as error:
        section.problem("config.json", f"it {error}", AGAIN)
        return found
    kind = found.fields.get("model_type")
    if kind not in CONFIG_CLASSES:
        text = f"model_type is {kind!r}; a Hunyuan checkpoint has one of {', '.join(CONFIG_CLASSES)}"
        section.problem("config.json", text, "name the folder of a Hunyuan checkpoint")
        return found
    found.network = _network(found.fields, section)
    if found.network is None:
        return found
    section.ok("network", _describe(found.network))
    _check_architecture(found.fields, section)
    _check_ids(found.network, section)
    _check_format(found, folder, section)
    return found


def _network(fields: dict[str, Any], section: Section) -> HunYuanConfig | None:
    """The network, or None where a field is wrong; then the others are judged as if it were absent."""
    fields = dict(fields)
    wrong: set[str] = set()
    while True:
        try:
            network = HunYuanConfig(**fields)
            return None if wrong else network
        except (ValueError, TypeError) as error:
            text = str(error).removeprefix("HunYuanConfig: ")
            name = text.partition(" ")[0]
            if name in wrong:  # an absent field's default does not fit the rest
                return None
            section.problem("config.json", text, AGAIN)
            wrong.add(name)
            if name not in fields or name in OTHERS_DEPEND_ON:
                return None
            del fields[name]


def parameters(config: HunYuanConfig) -> tuple[int, int]:
    """How many the network has, and how many of them a token's forward pass uses (of the experts, the chosen ones)."""
    total = active = 0
    for name, shape in expected_tensors(config).items():
        count = math.prod(shape)
        total += count
        if ".experts." in name:
            layer = int(name.split(".")[2])
            active += count * config.topk_at(layer) // config.experts_at(layer)
        else:
            active += count
    return total, active


def _describe(config: HunYuanConfig) -> str:
    total, active = parameters(config)
    owners = len({config.kv_owner(layer) for layer in range(config.num_hidden_layers)})
    return (
        f"{_count(total)} parameters, {_count(active)} used a token; {config.num_hidden_layers} layers, "
        f"{owners} of them with a KV cache; hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} KV heads of {config.head_dim}, "
        f"context {config.max_position_embeddings:,}"
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"


def _check_architecture(fields: dict[str, Any], section: Section) -> None:
    given = fields.get("architectures")
    if not (isinstance(given, list) and len(given) == 1 and given[0] in ARCHITECTURES):
        text = f"architectures is {given!r}, by which vLLM finds no Hunyuan model"
        section.problem("config.json", text, f'set it to ["{ARCHITECTURES[0]}"]')


def _check_format(found: ConfigFile, folder: Path, section: Section) -> None:
    assert found.network is not None
    try:
        found.format = read_format(found.fields, folder)
    except UnservedFormat as error:
        section.problem("quantization_config", error.text, error.remedy)
        return
    section.ok("format", found.format.name)
    sizes = found.format.rank_sizes(found.network)
    if sizes != tensor_parallel_sizes(found.network):
        section.ok("ranks", f"tensor_parallel_size {sizes or 'none'}: others cut through what has one scale")
    if found.format.hardware:
        section.ok("hardware", found.format.hardware)


def _check_ids(config: HunYuanConfig, section: Section) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not (isinstance(token, int) and 0 <= token < config.vocab_size):
                text = f"{name} is {token!r}, and the vocabulary has {config.vocab_size:,} ids"
                section.problem("config.json", text, AGAIN)
