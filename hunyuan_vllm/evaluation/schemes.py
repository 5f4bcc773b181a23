"""The contestants by name: how weights and KV cache are held, from which checkpoint, and vLLM's options for that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hunyuan_vllm.errors import UserError

__all__ = ["NAMES", "Scheme"]

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
