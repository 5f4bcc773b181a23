"""Serving a quantised network: what a scheme needs of the checkpoint, and what it adds to the server's options."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hunyuan_vllm import __version__
from hunyuan_vllm.errors import UserError
from hunyuan_vllm.server.model_source import ModelSource

__all__ = ["FP8", "SCHEMES", "Scheme", "scheme_named"]


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
    from hunyuan_vllm.quant.fp8_format import is_static_per_tensor

    if model.config is None:  # on the hub: vLLM says so later
        return
    described = getattr(model.config, "quantization_config", None)
    if described is None:
        raise UserError(
            f"MODEL_PATH={model.given} is not quantised: make an FP8 checkpoint of it with hunyuan-vllm quantize "
            f"{model.given} DESTINATION --scheme {FP8.name}, or serve it with deploy/run_server.sh"
        )
    if not is_static_per_tensor(described):
        raise UserError(
            f"MODEL_PATH={model.given} is no FP8 checkpoint with static scales (its quantization_config says "
            f"{described.get('quant_method')!r}): convert the BF16 checkpoint, or serve it with deploy/run_server.sh"
        )


FP8 = Scheme("fp8-w8a8c8", {"kv-cache-dtype": "fp8"}, check=_check_fp8, converts_demo=True)
SCHEMES = {scheme.name: scheme for scheme in (FP8,)}


def scheme_named(name: str | None) -> Scheme | None:
    """The scheme of that name; None for no name.

    Raises:
        UserError: there is none.
    """
    if name is None or name in SCHEMES:
        return SCHEMES[name] if name else None
    raise UserError(f"--scheme {name} is none of {', '.join(SCHEMES)}")
