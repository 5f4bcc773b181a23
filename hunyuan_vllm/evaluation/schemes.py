"""The schemes that an evaluation compares, and the checkpoints made for them"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from hunyuan_vllm.quant import schemes as quant
from hunyuan_vllm.quant.formats import Format
from hunyuan_vllm.server.models import ModelSource, convert, demo_in, open_model
from hunyuan_vllm.settings import Settings
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import gigabytes

CACHES = {"kv-bf16": "bf16", "kv-fp8": "fp8"}


@dataclass(frozen=True)
class Scheme:
    """One way to hold a model: weights and cache.

    Attributes:
        name: as the user wrote it, without the path.
        weights: the scheme of its weights.
        cache: "bf16" or "fp8".
        path: a checkpoint of its own; None for the common one.
    """

    name: str
    weights: quant.Scheme
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
        try:
            scheme = quant.find_scheme(weights)
        except UserError:
            scheme = None
        if scheme is None or (cache and cache not in CACHES):
            raise UserError(
                f"{name!r} is not a scheme: use one of {', '.join((*quant.SCHEMES, 'kv-fp8'))}, with +kv-fp8 or "
                "+kv-bf16 after it for the KV cache and :PATH for its own checkpoint, as in int8+kv-fp8 or "
                "fp8:/models/hunyuan-fp8"
            )
        default = "fp8" if scheme.kv_cache == "fp8" else "bf16"
        return cls(name, scheme, CACHES.get(cache, default), path or None)

    @property
    def label(self) -> str:
        """The name, with the last part of its own checkpoint's path."""
        return f"{self.name}:{Path(self.path).name}" if self.path else self.name

    def options(self, quantised: bool) -> list[str]:
        """vLLM's options for it on a checkpoint that is `quantised` on disk, or BF16."""
        quantization = None if quantised else self.weights.quantization
        options = [] if quantization is None else ["--quantization", quantization]
        return options + (["--kv-cache-dtype", "fp8"] if self.cache == "fp8" else [])


LARGEST_COPY = 32 * 10**9  # bytes of a checkpoint that is converted without having been asked to


def checkpoint_of(scheme: Scheme, model: ModelSource, progress: Progress) -> ModelSource:
    """The checkpoint for `scheme`; `model` where it names none. An FP8 copy of a BF16 one is made on first use.

    Raises:
        UserError: it is not there, or holds the network in another way.
    """
    source = open_model(scheme.path) if scheme.path else model
    stored = (source.format or Format()).scheme
    if stored in scheme.weights.stored:
        return source
    if stored == "bf16":
        return _converted(source, scheme, progress)
    found = source.format.name if source.format else "unquantised"
    raise UserError(
        f"{source.given} is {found}, and {scheme.name} starts from {scheme.weights.needs}: name another checkpoint, as "
        f"in {scheme.name}:PATH"
    )


def _converted(source: ModelSource, scheme: Scheme, progress: Progress) -> ModelSource:
    weights = scheme.weights
    if not weights.written:
        raise UserError(f"{weights.name} needs {weights.needs}: name it with {weights.name}:PATH")
    if not source.local or source.weight_bytes > LARGEST_COPY:
        what = f"is BF16 and has {gigabytes(source.weight_bytes)}" if source.local else "is a hub name"
        raise UserError(
            f"{weights.name} needs {weights.needs}, and {source.given} {what}: make one with hunyuan-vllm quantize "
            f"{source.given} DESTINATION --scheme {weights.name}, and name it with {weights.name}:DESTINATION"
        )
    folder, cache = Path(source.name), Settings.read(os.environ).cache_home
    target = cache / "hunyuan-vllm" / f"{folder.name}-{weights.name}-{_fingerprint(folder)}"
    if source.demo:  # the server's own copy
        target = Path(demo_in(weights, source, cache).name)
    convert(folder, target, weights, source.given, progress.console)
    return replace(open_model(str(target)), given=source.given, demo=source.demo)


def _fingerprint(folder: Path) -> str:
    """Of a checkpoint's files, by name, size and time of change."""
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())
    return hashlib.sha256(repr((str(folder), files)).encode()).hexdigest()[:12]
