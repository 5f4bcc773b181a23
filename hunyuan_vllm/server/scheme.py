"""Serving a quantised network: what a scheme needs of the checkpoint, and what it adds to the server's options."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from hunyuan_vllm import __version__
from hunyuan_vllm.errors import UserError
from hunyuan_vllm.server.model_source import ModelSource

__all__ = ["FP8", "INT8", "INT8_W8A8", "SCHEMES", "Scheme", "cpu_weight_bytes", "gpu_weight_bytes", "scheme_named"]


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
    from hunyuan_vllm.quant.int8_format import PACKED, PLAIN

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
    from hunyuan_vllm.quant.ignored import IgnoredLayers, quantised_linears

    if model.format is not None and model.format.kind is not None:
        expanded = model.format.kind == formats.FP8  # to bfloat16
        return model.weight_bytes * (2 if expanded else 1)
    if model.config is None or quantization not in [scheme.options["quantization"] for scheme in (INT8, INT8_W8A8)]:
        return model.weight_bytes
    quantised = sum(map(prod, quantised_linears(model.config, IgnoredLayers()).values()))
    return model.weight_bytes - quantised  # from two bytes each to one; the scales are less than a thousandth
