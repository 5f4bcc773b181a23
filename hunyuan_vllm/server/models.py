"""What MODEL_PATH, --lora-modules and the scheme name, checked before a server is started"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from hunyuan_vllm import __version__
from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.util.errors import UserError

if TYPE_CHECKING:
    from hunyuan_vllm.config import HunYuanConfig
    from hunyuan_vllm.quant.formats import Format
    from hunyuan_vllm.server.options import Flags

TOKENIZER_FILES = ("hy.tiktoken", "tokenizer.json")
# Fields of config.json that vLLM takes for a length; the smallest counts.
LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ModelSource:
    """A model to serve.

    Attributes:
        name: what vLLM is given: an absolute folder, or a hub name.
        given: what the user wrote, which clients may use as the model's name.
        config: the checkpoint's; None for a hub name, which vLLM downloads.
        weight_bytes: size of its weights; 0 where that is unknown.
        demo: it is the model that comes with the package.
        tokenizer: it brings one; True for a hub name.
        format: how its weights are stored; None where that is unknown.
    """

    name: str
    given: str
    config: HunYuanConfig | None = None
    weight_bytes: int = 0
    demo: bool = False
    tokenizer: bool = True
    format: Format | None = None

    @property
    def local(self) -> bool:
        return self.config is not None


def demo_model() -> ModelSource:
    """The model in the package.

    Raises:
        UserError: the installation has lost it.
    """
    from hunyuan_vllm import demo

    folder = demo.path()
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"the demo model is missing from {folder}: install hunyuan-vllm again, or set MODEL_PATH")
    return _open_folder(folder, "hunyuan-demo", demo=True)


def open_model(given: str) -> ModelSource:
    """A checkpoint folder, checked, or a hub name, taken as it is; `demo` is the demo model.

    Raises:
        UserError: there is no such folder, or it holds no Hunyuan checkpoint.
    """
    from hunyuan_vllm import demo

    folder = Path(given).expanduser()
    if folder.is_dir():
        return _open_folder(folder.resolve(), given)
    if given == demo.NAME:
        return demo_model()
    if folder.exists():
        raise UserError(f"MODEL_PATH={given} is a file: name the folder that holds config.json")
    if HUB_NAME.fullmatch(given):
        return ModelSource(given, given)
    raise UserError(f"the model {given} does not exist: name a folder, a hub name such as owner/model, or {demo.NAME}")


def check_files(model: ModelSource, flags: Flags, environ: Mapping[str, str]) -> None:
    """Look for what vLLM would miss in a checkpoint's folder only after seconds or minutes.

    Raises:
        UserError: no weights, no tokenizer, or the context asked for is longer than config.json allows.
    """
    from hunyuan_vllm.checkpoint import missing_weights

    if model.config is None:
        return
    if not model.weight_bytes and "load-format" not in flags:
        raise UserError(f"{model.given} {': '.join(missing_weights(Path(model.name)))}")
    elsewhere = any(name in flags for name in ("tokenizer", "tokenizer-mode", "skip-tokenizer-init"))
    if not (model.tokenizer or elsewhere):
        raise UserError(
            f"{model.given} has no tokenizer: copy hy.tiktoken or tokenizer.json there from the published checkpoint, "
            "or name a folder that has one with --tokenizer"
        )
    overridden = any(name in flags for name in ("hf-overrides", "hf-config-path"))
    allowed = environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0").strip().lower() in ("1", "true")
    asked, longest = flags.get("max-model-len"), longest_context(model.config)
    if asked and asked > longest and not (overridden or allowed):
        raise UserError(
            f"--max-model-len {asked} is more than the {longest} tokens of the model's config.json: give at most that "
            "(VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 tries more, at the risk of nonsense)"
        )


def longest_context(config: HunYuanConfig) -> int:
    """The longest context that vLLM accepts for a checkpoint, by its rules."""
    lengths = [value for name in LENGTHS if (value := getattr(config, name, None)) is not None]
    own = getattr(config, "model_max_length", None)
    factor = (config.rope_parameters or {}).get("factor") or 1.0
    return max(int((own or min(lengths)) * factor), own or 0)


def _open_folder(folder: Path, given: str, demo: bool = False) -> ModelSource:
    from hunyuan_vllm.checkpoint import check_headers, missing_config, shard_files

    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{given} {': '.join(missing_config(folder))}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}): download it again") from None
    if not isinstance(config, dict) or config.get("model_type") != "hunyuan":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise UserError(f"MODEL_PATH={given} has model_type {kind!r}; this server serves 'hunyuan' (Hunyuan-Large)")
    from hunyuan_vllm.config import HunYuanConfig
    from hunyuan_vllm.quant.formats import read_format

    try:
        parsed = HunYuanConfig.from_pretrained(folder)
        shards = shard_files(folder)
        form = read_format(config, folder)
        check_headers(folder, form.layout(parsed))
    except ValueError as error:
        raise UserError(str(error)) from None
    tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    weights = sum(shard.stat().st_size for shard in shards)
    return ModelSource(str(folder), given, parsed, weights, demo, tokenizer, form)


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


@dataclass(frozen=True)
class Scheme:
    """A quantisation to serve with.

    Attributes:
        name: as `hunyuan-vllm quantize --scheme` spells it.
        options: vLLM's options for it, unless the user gives them.
        ranks: the most GPUs it takes, unless told: the published network then fits.
        check: refuses a checkpoint that is not fit for it.
        converts_demo: the demo model has to be converted first.
    """

    name: str
    options: Mapping[str, str]
    ranks: int = 8
    check: Callable[[ModelSource], None] = field(default=lambda model: None)
    converts_demo: bool = False

    def demo_folder(self, demo: Path, cache_home: Path) -> Path:
        """Where the demo model is kept in this form: another for other contents or another version of this package."""
        digest = hashlib.sha256(__version__.encode())
        for file in sorted(demo.glob("*.safetensors")):
            digest.update(file.read_bytes())
        return cache_home / "hunyuan-vllm" / f"demo-{self.name}-{digest.hexdigest()[:12]}"

    def convert_demo(self, demo: Path, folder: Path) -> None:
        """Make it, once.

        Raises:
            UserError: the folder cannot be written, or another start is writing it.
        """
        if folder.exists():
            return
        from hunyuan_vllm.quantize.convert import quantize_checkpoint

        print(f"hunyuan-vllm: converting the demo model to {self.name}, once: {folder}", file=sys.stderr, flush=True)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder.parent} cannot be made ({error.strerror}): set XDG_CACHE_HOME") from None
        quantize_checkpoint(demo, folder, self.name)

    def with_demo(self, demo: ModelSource, cache_home: Path) -> ModelSource:
        """The demo model in this form, which need not have been made yet."""
        return replace(demo, name=str(self.demo_folder(Path(demo.name), cache_home))) if self.converts_demo else demo


def _check_fp8(model: ModelSource) -> None:
    from hunyuan_vllm.quant import formats

    if model.format is None or model.format.kind == formats.FP8:  # None: on the hub, where vLLM says so later
        return
    if model.format.kind is None:
        raise UserError(
            f"MODEL_PATH={model.given} is not quantised: make an FP8 checkpoint of it with hunyuan-vllm quantize "
            f"{model.given} DESTINATION --scheme {FP8.name}, or serve it with deploy/run_server.sh"
        )
    raise UserError(
        f"MODEL_PATH={model.given} has no static FP8 scales ({model.format.name}): serve it as it is with "
        "deploy/run_server.sh, or convert the unquantised checkpoint"
    )


def _check_int8(model: ModelSource) -> None:
    from hunyuan_vllm.quant.layouts import PACKED, PLAIN

    if model.format is not None and model.format.kind not in (None, PACKED, PLAIN):
        raise UserError(
            f"MODEL_PATH={model.given} is quantised otherwise ({model.format.name}): int8 is made of the unquantised "
            "checkpoint while it loads, or read from one that hunyuan-vllm quantize wrote with --scheme int8 or "
            "int8-w8a8; deploy/run_server.sh serves this one as it is"
        )


FP8 = Scheme("fp8-w8a8c8", {"kv-cache-dtype": "fp8"}, check=_check_fp8, converts_demo=True)
INT8 = Scheme("int8", {"quantization": "hunyuan_int8"}, check=_check_int8)
INT8_W8A8 = Scheme("int8-w8a8", {"quantization": "hunyuan_int8_w8a8"}, check=_check_int8)
SCHEMES = {scheme.name: scheme for scheme in (INT8, INT8_W8A8, FP8)}


def scheme_named(name: str | None) -> Scheme | None:
    """The scheme of that name; None for no name.

    Raises:
        UserError: there is none.
    """
    if name is None or name in SCHEMES:
        return SCHEMES[name] if name else None
    raise UserError(f"--scheme {name} is none of {', '.join(SCHEMES)}")


def gpu_weight_bytes(model: ModelSource, quantization: str | None) -> int:
    """Bytes of a checkpoint's weights in all GPUs' memory; 0 where that is unknown.

    Args:
        quantization: vLLM's option of that name.
    """
    quantised = model.format is not None and model.format.kind is not None
    return model.weight_bytes if quantised else cpu_weight_bytes(model, quantization)


def cpu_weight_bytes(model: ModelSource, quantization: str | None) -> int:
    """Bytes of a checkpoint's weights in a CPU server's memory.

    Args:
        quantization: vLLM's option of that name.
    """
    from hunyuan_vllm.quant import formats
    from hunyuan_vllm.quant.layouts import IgnoredLayers, quantised_linears

    if model.format is not None and model.format.kind is not None:
        expanded = model.format.kind == formats.FP8  # to bfloat16
        return model.weight_bytes * (2 if expanded else 1)
    if model.config is None or quantization not in [scheme.options["quantization"] for scheme in (INT8, INT8_W8A8)]:
        return model.weight_bytes
    quantised = sum(map(prod, quantised_linears(model.config, IgnoredLayers()).values()))
    return model.weight_bytes - quantised  # from two bytes each to one; the scales are less than a thousandth
