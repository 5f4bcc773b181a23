"""The model, adapters and scheme to serve, checked before a server starts"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from hunyuan_vllm import __version__, demo
from hunyuan_vllm.adapter import check_adapter
from hunyuan_vllm.chat_template import stored_template
from hunyuan_vllm.checkpoint import check_headers, missing_weights, read_config, shard_files
from hunyuan_vllm.network import Network
from hunyuan_vllm.quant.formats import Format
from hunyuan_vllm.quant.layouts import IgnoredLayers, quantised_linears
from hunyuan_vllm.quant.quantization_config import read_format
from hunyuan_vllm.quant.schemes import INT8, INT8_W8A8, Scheme
from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.streams import say
from hunyuan_vllm.util.text import HUB_NAME

if TYPE_CHECKING:
    from rich.console import Console

TOKENIZER_FILES = ("hy.tiktoken", "tokenizer.json")


@dataclass(frozen=True)
class ModelSource:
    """A model to serve.

    Attributes:
        name: what vLLM is given: an absolute directory, or a hub name.
        given: what the user wrote, which clients may use as the model's name.
        config: the checkpoint's; None for a hub name, which vLLM downloads.
        weight_bytes: size of its weights; 0 where that is unknown.
        demo: it is the model that comes with the package.
        tokenizer: it brings one; True for a hub name.
        format: how its weights are stored; None where that is unknown.
        chat_template: its own; None where it has none or that is unknown.
    """

    name: str
    given: str
    config: Network | None = None
    weight_bytes: int = 0
    demo: bool = False
    tokenizer: bool = True
    format: Format | None = None
    chat_template: str | None = None

    @property
    def local(self) -> bool:
        return self.config is not None


def demo_model() -> ModelSource:
    """The model in the package."""
    directory = demo.path()
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"the demo model is missing from {directory}: install hunyuan-vllm again, or set MODEL_PATH")
    return _open_directory(directory, "hunyuan-demo", is_demo=True)


def open_model(given: str | None) -> ModelSource:
    """A checkpoint directory, checked, or a hub name, taken as it is; `demo` or nothing is the demo model."""
    if not given:
        return demo_model()
    directory = Path(given).expanduser()
    if directory.is_dir():
        return _open_directory(directory.resolve(), given)
    if given == demo.NAME:
        return demo_model()
    if directory.exists():
        raise UserError(f"MODEL_PATH={given} is a file: name the directory that holds config.json")
    if HUB_NAME.fullmatch(given):
        return ModelSource(given, given)
    raise UserError(
        f"the model {given} does not exist: name a directory, a hub name such as owner/model, or {demo.NAME}"
    )


def check_files(model: ModelSource, flags: Flags, environ: Mapping[str, str]) -> None:
    """Check what vLLM would report as missing only after seconds or minutes."""
    if model.config is None:
        return
    if not model.weight_bytes and "load-format" not in flags:
        raise UserError(f"{model.given} {': '.join(missing_weights(Path(model.name)))}")
    elsewhere = any(name in flags for name in ("tokenizer", "tokenizer-mode", "skip-tokenizer-init"))
    if not (model.tokenizer or elsewhere):
        raise UserError(
            f"{model.given} has no tokenizer: copy hy.tiktoken or tokenizer.json there from the published checkpoint, "
            "or name a directory that has one with --tokenizer"
        )
    overridden = any(name in flags for name in ("hf-overrides", "hf-config-path"))
    allowed = environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0").strip().lower() in ("1", "true")
    asked, longest = flags.get("max-model-len"), model.config.longest_context
    if asked and asked > longest and not (overridden or allowed):
        raise UserError(
            f"--max-model-len {asked} exceeds the model's {longest} tokens: give at most that "
            "(VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 permits more, with unreliable output)"
        )


def _open_directory(directory: Path, given: str, is_demo: bool = False) -> ModelSource:
    fields, config = read_config(directory)
    try:
        shards = shard_files(directory)
        form = read_format(fields, directory)
        check_headers(directory, form.layout(config))
    except ValueError as error:
        raise UserError(str(error)) from None
    tokenizer = any((directory / name).is_file() for name in TOKENIZER_FILES)
    weights = sum(shard.stat().st_size for shard in shards)
    template, _ = stored_template(directory)
    return ModelSource(str(directory), given, config, weights, is_demo, tokenizer, form, template)


MAX_LORA_RANK = 16  # vLLM's, where --max-lora-rank does not say


def check_adapters(flags: Flags, config: Network | None, cpu: bool) -> None:
    """Refuse adapters that would be applied only in part or not at all. Those on the hub are left to vLLM."""
    given = flags.get("lora-modules")
    if not given:
        return
    if "enable-lora" not in flags:
        raise UserError("--lora-modules needs --enable-lora")
    for item in given:
        name, path = _name_and_path(item)
        directory = Path(path).expanduser()
        if config is None or not directory.exists() and HUB_NAME.fullmatch(path):
            continue
        try:
            check_adapter(directory, config, cpu, flags.integer("max-lora-rank", MAX_LORA_RANK))
        except UserError as error:
            raise UserError(f"--lora-modules {name}: {error}") from None


def _name_and_path(item: str) -> tuple[str, str]:
    """Name and path, from NAME=PATH or a JSON object with both, as vLLM reads them."""
    if "=" in item and "," not in item:
        name, _, path = item.partition("=")
        return name, path
    try:
        fields = json.loads(item)
        return fields["name"], fields["path"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--lora-modules {item} is not NAME=DIRECTORY, nor a JSON object with name and path") from None


def check_scheme(scheme: Scheme, model: ModelSource) -> None:
    """Refuse a checkpoint that cannot be served in this scheme; one on the hub is left to vLLM."""
    form = model.format
    if form is None or form.scheme in scheme.stored or (model.demo and scheme.written):
        return
    found = f"MODEL_PATH={model.given} is {form.name}, and --scheme {scheme.name} serves {scheme.needs}"
    if form.kind is not None:
        raise UserError(f"{found}: deploy/run_server.sh serves it as it is")
    made = (
        f"make one with hunyuan-vllm quantize {model.given} DESTINATION --scheme {scheme.name}"
        if scheme.written
        else "name a published one, or serve this one with deploy/run_server_int8.sh"
    )
    raise UserError(f"{found}: {made}")


def demo_in(scheme: Scheme, model: ModelSource, cache_home: Path) -> ModelSource:
    """The demo model for this scheme: where that needs a checkpoint of its own, its copy, which need not exist yet.
    The copy's name changes with the demo model's contents and with the version of this package."""
    if scheme.while_loading or not scheme.written:
        return model
    digest = hashlib.sha256(__version__.encode())
    for file in sorted(Path(model.name).glob("*.safetensors")):
        digest.update(file.read_bytes())
    return replace(model, name=str(cache_home / "hunyuan-vllm" / f"demo-{scheme.name}-{digest.hexdigest()[:12]}"))


def convert(source: Path, target: Path, scheme: Scheme, given: str, console: "Console | None" = None) -> None:
    """Write a checkpoint, which the user calls `given`, in another scheme to the cache, once."""
    if target.exists():
        return
    from hunyuan_vllm.quantize.convert import quantize_checkpoint

    say(f"converting {given} to {scheme.name}, once: {target}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target.parent} cannot be created ({error.strerror}): set XDG_CACHE_HOME") from None
    quantize_checkpoint(source, target, scheme.name, console=console)


def gpu_weight_bytes(model: ModelSource, quantization: str | None) -> int:
    """Bytes of a checkpoint's weights in all GPUs' memory with vLLM's --quantization; 0 where that is unknown."""
    quantised = model.format is not None and model.format.kind is not None
    return model.weight_bytes if quantised else cpu_weight_bytes(model, quantization)


def cpu_weight_bytes(model: ModelSource, quantization: str | None) -> int:
    """Bytes of a checkpoint's weights in a CPU server's memory."""
    if model.format is not None and model.format.kind is not None:
        expanded = model.format.ours and model.format.scheme == "fp8"  # to bfloat16
        return model.weight_bytes * (2 if expanded else 1)
    if model.config is None or quantization not in (INT8.quantization, INT8_W8A8.quantization):
        return model.weight_bytes
    quantised = sum(map(prod, quantised_linears(model.config, IgnoredLayers()).values()))
    return model.weight_bytes - quantised  # from two bytes each to one; the scales are less than a thousandth
