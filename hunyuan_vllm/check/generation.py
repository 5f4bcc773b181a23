"""generation_config.json: where answers end, and the sampling that requests get that do not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hunyuan_vllm.check.configs import ConfigFile, read_object
from hunyuan_vllm.check.text import ids_of
from hunyuan_vllm.checkpoint import PUBLISHED_AT
from hunyuan_vllm.util.findings import Section

# Field → (least, whether that one is excluded, most, in words).
RANGES: dict[str, tuple[float, bool, float, str]] = {
    "temperature": (0, False, 10, "from 0 to 10"),
    "top_p": (0, True, 1, "above 0, at most 1"),
    "top_k": (-1, False, 1e9, "at least 1, or 0 for no limit"),
    "min_p": (0, False, 1, "from 0 to 1"),
    "repetition_penalty": (0, True, 10, "above 0; 1 is none"),
}


PUBLISHED = "the published one has eos ids 127960 and 127967, temperature 0.7, top_p 0.6, top_k 20"


def read_generation(folder: Path) -> dict[str, Any]:
    """Its fields; empty where it cannot be read."""
    try:
        return read_object(folder / "generation_config.json")
    except ValueError:
        return {}


def check_generation(folder: Path, config: ConfigFile, section: Section) -> None:
    """Check fields on their own; `tokenizer_files.py` and `template.py` compare its ids with the tokenizer's."""
    path = folder / "generation_config.json"
    if not path.exists():
        text = "there is none: answers end only at the tokenizer's end token, and vLLM samples at temperature 1"
        section.warning("generation_config.json", text, f"copy it there from {PUBLISHED_AT} ({PUBLISHED})")
        return
    try:
        fields = read_object(path)
    except ValueError as error:
        section.problem("generation_config.json", f"it {error}", f"download it again ({PUBLISHED})")
        return
    if not ids_of(fields.get("eos_token_id")):
        text = "it names no eos_token_id, so answers end only at the tokenizer's end token"
        section.warning("eos_token_id", text, f"add it ({PUBLISHED})")
    _check_generation_ids(fields, config, section)
    for name, (least, excluded, most, words) in RANGES.items():
        value = fields.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and least <= value <= most and not (excluded and value == least)):
            section.problem(name, f"it is {value!r}; it must be {words}", f"correct it ({PUBLISHED})")
    do_sample, length = fields.get("do_sample"), fields.get("max_new_tokens")
    if do_sample is not None and not isinstance(do_sample, bool):
        section.problem("do_sample", f"it is {do_sample!r}; it must be true or false", f"correct it ({PUBLISHED})")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        section.problem("max_new_tokens", f"it is {length!r}; it must be at least 1", "correct it, or leave it out")
    elif length is not None:
        text = f"answers end after {length:,} tokens unless a request says otherwise"
        section.warning("max_new_tokens", text, "leave it out, and answers may fill the context")
    if section.sound:
        defaults = fields if do_sample is not False else fields | {"temperature": "0 (do_sample is false)"}
        sampling = ", ".join(f"{name} {defaults[name]}" for name in RANGES if defaults.get(name) is not None)
        stops = ", ".join(map(str, ids_of(fields.get("eos_token_id"))))
        section.ok("generation", f"ends at {stops or 'the end token'}; {sampling or 'no sampling defaults'}")


def _check_generation_ids(fields: dict[str, Any], config: ConfigFile, section: Section) -> None:
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        for token in ids_of(fields.get(name)):
            whole = isinstance(token, int) and not isinstance(token, bool) and token >= 0
            if not whole or (config.network is not None and token >= config.network.vocab_size):
                rows = f"the vocabulary has {config.network.vocab_size:,} ids" if config.network else "it is no id"
                section.problem(name, f"it is {token!r}, and {rows}", f"correct it ({PUBLISHED})")
