"""config.json and generation_config.json of a checkpoint"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hunyuan_vllm.checkpoint import read_config
from hunyuan_vllm.layout import expected_tensors, tensor_parallel_sizes
from hunyuan_vllm.network import ARCHITECTURES, Network
from hunyuan_vllm.quant.formats import Format, UnservedFormat
from hunyuan_vllm.quant.quantization_config import read_format
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.text import plural

AGAIN = "download config.json from the published checkpoint again"
SMALL_VOCABULARY = 120818  # of the models from 0.5B to 4B


@dataclass
class ConfigFile:
    """config.json: its fields, the network and the format of the weights; None where the fields do not describe it."""

    fields: dict[str, Any] = field(default_factory=dict)
    network: Network | None = None
    format: Format | None = None

    @property
    def is_v1(self) -> bool:
        """Whether it is a V1 model; some of those have the model_type and architecture of Hunyuan-Large, but no CLA."""
        return self.network is not None and (self.network.is_v1 or not self.network.use_cla)


def check_config(directory: Path, section: Section) -> ConfigFile:
    found = ConfigFile()
    try:
        found.fields, found.network = read_config(directory)
    except (UserError, TypeError) as error:
        section.problem("config.json", str(error), AGAIN)
        return found
    section.ok("network", _describe(found.network))
    section.ok("GPUs", f"hunyuan-vllm plan --model {directory} says which can serve it")
    given = found.fields.get("architectures")
    if not (isinstance(given, list) and len(given) == 1 and given[0] in ARCHITECTURES):
        text = f"architectures is {given!r}, which vLLM does not map to a Hunyuan model"
        section.problem("config.json", text, f'set it to ["{ARCHITECTURES[0]}"]')
    for name, wrong in _bad_ids(vars(found.network), found.network.vocab_size):
        section.problem("config.json", f"{name} is {wrong}", AGAIN)
    _check_format(found, directory, section)
    return found


def parameters(config: Network) -> tuple[int, int]:
    """All of the network's, and those that a token's forward pass uses (of the experts, the chosen ones)."""
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


def _describe(config: Network) -> str:
    total, active = parameters(config)
    owners = len({config.kv_owner(layer) for layer in range(config.num_hidden_layers)})
    return (
        f"{_count(total)} parameters, {_count(active)} used per token; {plural(config.num_hidden_layers, 'layer')}, "
        f"{owners} of them with a KV cache; hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} KV heads of {config.head_dim}, "
        f"context {config.max_position_embeddings:,}"
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"


def _check_format(found: ConfigFile, directory: Path, section: Section) -> None:
    assert found.network is not None
    try:
        found.format = read_format(found.fields, directory)
    except UnservedFormat as error:
        section.problem("quantization_config", error.text, error.remedy)
        return
    section.ok("format", found.format.name)
    sizes = found.format.rank_sizes(found.network)
    if sizes != tensor_parallel_sizes(found.network):
        section.ok(
            "ranks", f"tensor_parallel_size {sizes or 'none'}: other sizes would split groups that share a scale"
        )
    if found.format.hardware:
        section.ok("hardware", found.format.hardware)


def _bad_ids(fields: Mapping[str, Any], rows: int | None) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) of each token id outside a vocabulary's `rows`, where these are known."""
    known = "it is not an id" if rows is None else f"the vocabulary has {rows:,} ids"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for token in ids_of(fields.get(name)):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < (rows or token + 1):
                yield name, f"{token!r}, and {known}"


class GenerationDefaults(BaseModel):
    """The fields of generation_config.json that vLLM takes as defaults of requests."""

    model_config = ConfigDict(strict=True)

    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    do_sample: bool | None = None
    max_new_tokens: int | None = Field(None, ge=1)


def published_settings(config: ConfigFile) -> str:
    """The published generation settings of this model, for messages."""
    network = config.network
    ids = "120020 and 120026" if network and network.vocab_size == SMALL_VOCABULARY else "127960 and 127967"
    top_p = 0.8 if config.is_v1 else 0.6
    return f"the published one has eos ids {ids}, temperature 0.7, top_p {top_p}, top_k 20"


def ids_of(value: Any) -> list[Any]:
    """The ids in a config's field, which may be one, a list or null."""
    return [] if value is None else value if isinstance(value, list) else [value]


def stop_ids(config: ConfigFile, generation: dict[str, Any]) -> list[Any]:
    """Where generation ends: generation_config.json's eos ids, else config.json's."""
    return ids_of(generation.get("eos_token_id", config.fields.get("eos_token_id")))


def check_generation(directory: Path, config: ConfigFile, section: Section) -> dict[str, Any]:
    """Check generation_config.json by itself, and return its fields; `text` compares its ids with the tokenizer's."""
    published = published_settings(config)
    try:
        fields = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        text = "there is none: answers end only at the tokenizer's end token, and vLLM samples at temperature 1"
        section.warning("generation_config.json", text, f"copy it from the published checkpoint ({published})")
        return {}
    except (OSError, ValueError) as error:
        fields = str(error)
    if not isinstance(fields, dict):
        section.problem(
            "generation_config.json", f"it is not a JSON object: {fields}", f"download it again ({published})"
        )
        return {}
    _check_defaults(fields, config, published, section)
    return fields


def _check_defaults(fields: dict[str, Any], config: ConfigFile, published: str, section: Section) -> None:
    if not ids_of(fields.get("eos_token_id")):
        text = "it names no eos_token_id, so answers end only at the tokenizer's end token"
        section.warning("eos_token_id", text, f"add it ({published})")
    for name, wrong in _bad_ids(fields, config.network.vocab_size if config.network else None):
        section.problem(name, f"it is {wrong}", f"correct it ({published})")
    try:
        defaults = GenerationDefaults.model_validate(fields)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            text = f"it is {one['input']!r}: {one['msg']}"
            section.problem(str(one["loc"][0]), text, f"correct it ({published})")
        return
    if defaults.max_new_tokens is not None:
        text = f"answers end after {defaults.max_new_tokens:,} tokens unless a request says otherwise"
        section.warning("max_new_tokens", text, "remove it to let answers fill the context")
    if section.sound:
        shown = defaults.model_dump(exclude_none=True, exclude={"do_sample", "max_new_tokens"})
        if defaults.do_sample is False:
            shown["temperature"] = "0 (do_sample is false)"
        sampling = ", ".join(f"{name} {value}" for name, value in shown.items())
        stops = ", ".join(map(str, ids_of(fields.get("eos_token_id"))))
        section.ok("generation", f"ends at {stops or 'the end token'}; {sampling or 'no sampling defaults'}")
