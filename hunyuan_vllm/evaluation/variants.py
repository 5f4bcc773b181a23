"""What an evaluation compares: quantisation schemes with a KV cache type, and the checkpoints converted for them"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from hunyuan_vllm.envs import Settings
from hunyuan_vllm.quant.formats import Format
from hunyuan_vllm.quant.schemes import SCHEMES, Scheme, find_scheme
from hunyuan_vllm.server.models import ModelSource, convert, demo_in, open_model
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import gigabytes

CACHES = {"kv-bf16": "bf16", "kv-fp8": "fp8"}


@dataclass(frozen=True)
class Variant:
    """A model under a quantisation scheme, with a type of KV cache.

    Attributes:
        name: as the user wrote it, without the path.
        weights: the scheme of its weights.
        cache: "bf16" or "fp8".
        path: a checkpoint of its own; None for the common one.
    """

    name: str
    weights: Scheme
    cache: str
    path: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read WEIGHTS[+kv-fp8|+kv-bf16][:PATH], as in int8, int8+kv-fp8 or fp8:/models/hunyuan-fp8.

        `kv-fp8` alone means bf16+kv-fp8. `fp8` comes with the FP8 cache.
        """
        name, _, path = text.partition(":")
        weights, _, cache = ("bf16", "", name) if name in CACHES else name.partition("+")
        try:
            scheme = find_scheme(weights)
        except UserError:
            scheme = None
        if scheme is None or (cache and cache not in CACHES):
            raise UserError(
                f"{name!r} is not a scheme: use one of {', '.join((*SCHEMES, 'kv-fp8'))}, with +kv-fp8 or "
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


MAX_CONVERTED = 32 * 10**9  # bytes; larger checkpoints are not converted unasked


def checkpoint_of(variant: Variant, model: ModelSource, progress: Progress) -> ModelSource:
    """The checkpoint of `variant`, by default `model`; a BF16 one is converted on first use if the scheme needs it."""
    source = open_model(variant.path) if variant.path else model
    stored = (source.format or Format()).scheme
    if stored in variant.weights.stored:
        return source
    if stored == "bf16":
        return _converted(source, variant.weights, progress)
    found = source.format.name if source.format else "unquantised"
    raise UserError(
        f"{source.given} is {found}, and {variant.name} starts from {variant.weights.needs}: name another checkpoint, "
        f"as in {variant.name}:PATH"
    )


def _converted(source: ModelSource, weights: Scheme, progress: Progress) -> ModelSource:
    if not weights.written:
        raise UserError(f"{weights.name} needs {weights.needs}: name it with {weights.name}:PATH")
    if not source.local or source.weight_bytes > MAX_CONVERTED:
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
