"""Which checkpoint a scheme runs on: its own, the common one, or an FP8 copy of it that is made once."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.evaluation.schemes import Scheme
from hunyuan_vllm.quant import formats
from hunyuan_vllm.quant.int8_format import PACKED, PLAIN
from hunyuan_vllm.quantize.progress import Progress, gigabytes
from hunyuan_vllm.server.model_source import ModelSource, open_model
from hunyuan_vllm.server.scheme import FP8
from hunyuan_vllm.server.settings import Settings

__all__ = ["checkpoint_of"]

# What a scheme's weights may be on disk, beside unquantised.
KINDS = {"bf16": (), "int8": (PACKED, PLAIN), "int8-w8a8": (PACKED, PLAIN), "fp8": (formats.FP8,)}
LARGEST_COPY = 32 * 10**9  # bytes of a checkpoint that is converted without having been asked to


def checkpoint_of(scheme: Scheme, model: ModelSource, progress: Progress) -> ModelSource:
    """The checkpoint for `scheme`; `model` where it names none. An FP8 copy of a BF16 one is made on first use.

    Raises:
        UserError: it is not there, or holds the network in another way.
    """
    source = open_model(scheme.path) if scheme.path else model
    stored = source.format or formats.Format()
    if stored.kind is not None and stored.kind not in KINDS[scheme.weights]:
        raise UserError(
            f"{source.given} is quantised ({stored.name}), which {scheme.name} cannot start from: name another "
            f"checkpoint, as in {scheme.name}:PATH"
        )
    return _fp8_copy(source, progress) if scheme.weights == "fp8" and stored.kind is None else source


def _fp8_copy(source: ModelSource, progress: Progress) -> ModelSource:
    if not source.local or source.weight_bytes > LARGEST_COPY:
        what = f"is BF16 and has {gigabytes(source.weight_bytes)}" if source.local else "is a hub name"
        raise UserError(
            f"fp8 needs an FP8 checkpoint, and {source.given} {what}: make one with hunyuan-vllm quantize "
            f"{source.given} DESTINATION --scheme {FP8.name}, and name it with fp8:DESTINATION"
        )
    folder, cache = Path(source.name), Settings.read(os.environ).cache_home
    if source.demo:  # the server's own copy
        target = FP8.demo_folder(folder, cache)
    else:
        target = cache / "hunyuan-vllm" / f"{folder.name}-{FP8.name}-{_fingerprint(folder)}"
    if not target.exists():
        from hunyuan_vllm.quantize.convert import quantize_checkpoint

        progress.say(f"fp8: converting {source.given}, once: {target}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{target.parent} cannot be made ({error.strerror}): set XDG_CACHE_HOME") from None
        quantize_checkpoint(folder, target, FP8.name, console=progress.console)
    return replace(open_model(str(target)), given=source.given, demo=source.demo)


def _fingerprint(folder: Path) -> str:
    """Of a checkpoint's files, by name, size and time of change."""
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())
    return hashlib.sha256(repr((str(folder), files)).encode()).hexdigest()[:12]
