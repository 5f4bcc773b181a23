"""The schemes that an evaluation compares, and the checkpoints made for them"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from hunyuan_vllm.quant import formats
from hunyuan_vllm.quant.layouts import PACKED, PLAIN
from hunyuan_vllm.server.models import FP8, ModelSource, open_model
from hunyuan_vllm.server.options import Settings
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import gigabytes

# vLLM's --quantization for a BF16 checkpoint; a quantised checkpoint says by itself what it is.
QUANTIZATION = {"bf16": None, "int8": "hunyuan_int8", "int8-w8a8": "hunyuan_int8_w8a8", "fp8": None}
CACHES = {"kv-bf16": "bf16", "kv-fp8": "fp8"}
NAMES = (*QUANTIZATION, "kv-fp8")


@dataclass(frozen=True)
class Scheme:
    """One way to hold a model.

    Attributes:
        name: as the user wrote it, without the path.
        weights: a key of QUANTIZATION.
        cache: "bf16" or "fp8".
        path: a checkpoint of its own; None for the common one.
    """

    name: str
    weights: str
    cache: str
    path: str | None = None

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read WEIGHTS[+kv-fp8|+kv-bf16][:PATH], as in int8, int8+kv-fp8 or fp8:/models/hunyuan-fp8.

        `kv-fp8` alone means bf16+kv-fp8. `fp8` comes with the FP8 cache.

        Raises:
            UserError: there is no such scheme.
        """
        name, _, path = text.partition(":")
        weights, _, cache = ("bf16", "", name) if name in CACHES else name.partition("+")
        if weights not in QUANTIZATION or (cache and cache not in CACHES):
            raise UserError(
                f"{name!r} is no scheme: choose among {', '.join(NAMES)}, with +kv-fp8 or +kv-bf16 behind it for the "
                "KV cache and :PATH for a checkpoint of its own, as in int8+kv-fp8 or fp8:/models/hunyuan-fp8"
            )
        default = "fp8" if weights == "fp8" else "bf16"
        return cls(name, weights, CACHES.get(cache, default), path or None)

    @property
    def label(self) -> str:
        """The name, with the last part of its own checkpoint's path."""
        return f"{self.name}:{Path(self.path).name}" if self.path else self.name

    def options(self, quantised: bool) -> list[str]:
        """vLLM's options for it on a checkpoint that is `quantised` on disk, or BF16."""
        quantization = None if quantised else QUANTIZATION[self.weights]
        options = [] if quantization is None else ["--quantization", quantization]
        return options + (["--kv-cache-dtype", "fp8"] if self.cache == "fp8" else [])


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
