"""Which checkpoint a scheme runs on: its own, the common one, or an FP8 copy of it that is made once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.evaluation.schemes import Scheme
from hunyuan_vllm.quantize.progress import Progress
from hunyuan_vllm.server.model_source import ModelSource, open_model

__all__ = ["checkpoint_of", "copies"]

METHODS = {"fp8": {"fp8"}, "int8": {"compressed-tensors"}, "int8-w8a8": {"compressed-tensors"}, "bf16": set()}


def checkpoint_of(scheme: Scheme, model: ModelSource, progress: Progress) -> ModelSource:
    """The checkpoint for `scheme`; `model` where it names none. An FP8 copy of a BF16 one is made on first use.

    Raises:
        UserError: it is not there, or holds the model in another way.
    """
    source = open_model(scheme.path) if scheme.path else model
    method = (getattr(source.config, "quantization_config", None) or {}).get("quant_method")
    if method is not None and method not in METHODS[scheme.weights]:
        raise UserError(
            f"{source.given} is quantised ({method}), which {scheme.name} cannot start from: name another checkpoint "
            f"with {scheme.name}:PATH"
        )
    if scheme.weights == "fp8" and method is None:
        return _fp8_copy(source, progress)
    return source


def copies(environ: dict[str, str]) -> Path:
    """Where quantised copies are kept."""
    cache = environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    return Path(cache).expanduser() / "hunyuan-vllm" / "quantized"


def _fp8_copy(source: ModelSource, progress: Progress) -> ModelSource:
    if not source.local:
        raise UserError(f"fp8 needs an FP8 checkpoint: {source.given} is a hub name, so name one with fp8:PATH")
    from hunyuan_vllm.quantize.convert import quantize_checkpoint

    folder = Path(source.name)
    target = copies(dict(os.environ)) / f"{folder.name}-{_fingerprint(folder)}-fp8-w8a8c8"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        progress.say(f"fp8: quantising {source.given}, once, to {target}")
        quantize_checkpoint(folder, target, scheme="fp8-w8a8c8", console=progress.console)
    return open_model(str(target))


def _fingerprint(folder: Path) -> str:
    """Of a checkpoint's files, by name, size and time of change."""
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())
    return hashlib.sha256(repr((str(folder), files)).encode()).hexdigest()[:12]
