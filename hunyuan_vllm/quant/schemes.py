"""The quantisation schemes, by the names that all commands and scripts use. Imports neither torch nor vLLM."""

from collections.abc import Container
from dataclasses import dataclass

from hunyuan_vllm.util.errors import UserError


@dataclass(frozen=True)
class Scheme:
    """A way to hold a network's weights and compute with them.

    Attributes:
        stored: names of the schemes that a checkpoint may be stored in, to be served in this one.
        needs: what it is served from, for messages.
        quantization: vLLM's --quantization for it; None where the checkpoint's config.json says it.
        kv_cache: the type of the KV cache that belongs to it, as vLLM's --kv-cache-dtype.
        max_ranks: the most GPUs a server takes by default; None for all there are.
        written: `hunyuan-vllm quantize` writes checkpoints in it.
    """

    name: str
    stored: tuple[str, ...]
    needs: str
    quantization: str | None = None
    kv_cache: str = "auto"
    max_ranks: int | None = 8
    written: bool = True

    @property
    def while_loading(self) -> bool:
        """An unquantised checkpoint is quantised while it loads."""
        return self.quantization is not None

    @property
    def options(self) -> dict[str, str]:
        """vLLM's options that it stands for."""
        options = {"quantization": self.quantization} if self.quantization else {}
        return options | ({"kv-cache-dtype": self.kv_cache} if self.kv_cache != "auto" else {})


_ANY_INT8 = ("bf16", "int8", "int8-w8a8")
_INT8_SOURCE = "an unquantised checkpoint, or one that hunyuan-vllm quantize wrote with --scheme int8 or int8-w8a8"
BF16 = Scheme("bf16", ("bf16",), "an unquantised checkpoint", max_ranks=None, written=False)
INT8 = Scheme("int8", _ANY_INT8, _INT8_SOURCE, "hunyuan_int8")
INT8_W8A8 = Scheme("int8-w8a8", _ANY_INT8, _INT8_SOURCE, "hunyuan_int8_w8a8")
FP8 = Scheme("fp8", ("fp8",), "an FP8 checkpoint", kv_cache="fp8")
INT4 = Scheme("int4", ("int4",), "a 4-bit checkpoint: GPTQ, AWQ or compressed-tensors", written=False)

SCHEMES = {scheme.name: scheme for scheme in (BF16, INT8, INT8_W8A8, FP8, INT4)}
WRITTEN = {name: scheme for name, scheme in SCHEMES.items() if scheme.written}
_FORMER_NAMES = {"fp8-w8a8c8": "fp8"}


def find_scheme(name: str, names: Container[str] = SCHEMES) -> Scheme:
    """The scheme of this name, or of a former one."""
    name = _FORMER_NAMES.get(name, name)
    if name not in names or name not in SCHEMES:
        known = ", ".join(known for known in SCHEMES if known in names)
        raise UserError(f"--scheme {name} is not known here: use one of {known}")
    return SCHEMES[name]
