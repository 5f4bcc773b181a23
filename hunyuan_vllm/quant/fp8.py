"""`hunyuan_fp8`: W8A8 in FP8 with static scales, and the scales of an FP8 KV cache"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.platforms import current_platform

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import CheckpointError, Layout
from hunyuan_vllm.quant.base import HunYuanQuantization
from hunyuan_vllm.quant.layouts import E4M3_NAME, IgnoredLayers, cache_scale, is_quantised
from hunyuan_vllm.quant.quantization_config import ignored_layers, is_static_fp8, quantization_of, static_fp8
from hunyuan_vllm.quant.rounding import E4M3, E4M3_MAX

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

CACHE_SCALES_FILE = "kv_cache_scales.safetensors"  # as AngelSlim writes it


def normalised_key_scale(head_dim: int) -> float:
    """The E4M3 scale at which no k̂ saturates: the bound sqrt(head_dim) becomes 448."""
    return math.sqrt(head_dim) / E4M3_MAX


class CacheScales:
    """The KV scales of one checkpoint, by canonical name. A cross layer's own are never asked for."""

    def __init__(self) -> None:
        self._given: dict[str, float] = {}

    def keep(self, name: str, scale: float) -> None:
        self._given[name] = scale

    def read(self, file: Path) -> None:
        """Keep the scales in a file beside the weights, which their index need not name; there may be none.

        Raises:
            CheckpointError: the file is not readable, or has more than one scale for a layer's K or V.
        """
        if not file.is_file():
            return
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): download it again") from None
        for stored, tensor in tensors.items():
            if (name := cache_scale(stored)) is None:
                continue
            if tensor.numel() != 1:
                raise CheckpointError(
                    f"{file}: {stored!r} has shape {list(tensor.shape)}, and the FP8 cache has one scale for a layer's "
                    "K and one for its V: remove the file, or quantise again with a scale per tensor"
                )
            self.keep(name, _checked_scale(stored, tensor).item())

    def k(self, layer: int) -> float | None:
        """The scale of an owner layer's K, or None; a `kv_scale` counts where there is no `k_scale`."""
        return self._of(layer, "k")

    def v(self, layer: int) -> float | None:
        """The same of its V."""
        return self._of(layer, "v")

    def _of(self, layer: int, which: str) -> float | None:
        prefix = f"model.layers.{layer}.self_attn."
        return self._given.get(f"{prefix}{which}_scale", self._given.get(f"{prefix}kv_scale"))


logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name


_EXPERT_INPUT_SCALE = re.compile(r"^(.*\.experts\.\d+)\.(?:gate|up)_proj\.input_scale$")


class HunYuanFp8Config(HunYuanQuantization):
    """Weights and activations in E4M3 with one static scale per tensor."""

    name: ClassVar[str] = "hunyuan_fp8"

    def __init__(self, ignored: IgnoredLayers | None = None) -> None:
        super().__init__()
        self.ignored = ignored or IgnoredLayers()
        self.cache_scales = CacheScales()
        self._input_scales: dict[str, Tensor] = {}

    # What vLLM asks of a quantisation.

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HunYuanFp8Config:
        if not is_static_fp8(config):
            raise ValueError(
                f"quantization={cls.name!r} reads FP8 checkpoints with one static scale per tensor, and in config.json "
                f"quantization_config is {config}: make one with hunyuan-vllm quantize --scheme fp8"
            )
        return cls(ignored_layers(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Takes over static per-tensor FP8 checkpoints of Hunyuan networks from vLLM's own methods."""
        ours = is_static_fp8(hf_quant_cfg) and isinstance(hf_config, HunYuanConfig)
        methods = (None, cls.name, "fp8", "compressed-tensors", "modelopt")
        return cls.name if ours and user_quant in methods else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Raises ValueError for a model of another kind, or a GPU with another kind of FP8."""
        super().maybe_update_config(model_name, hf_config, revision)
        self.cache_scales.read(Path(model_name) / CACHE_SCALES_FILE)
        if current_platform.is_fp8_fnuz():
            raise ValueError(f"quantization={self.name!r} needs E4M3 as NVIDIA GPUs and CPUs have it, not E4M3 FNUZ")

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        if isinstance(layer, LinearBase):
            if self.ignored.covers(prefix):
                return UnquantizedLinearMethod()
            from hunyuan_vllm.quant import fp8_layers

            self._say_how_cpus_compute()
            return fp8_layers.linear_method(self.upstream)
        if isinstance(layer, RoutedExperts) and not self.ignored.covers(prefix):
            from hunyuan_vllm.quant import fp8_layers

            return fp8_layers.experts_method(self.upstream, layer)
        return None

    # What the loader asks.

    def layout(self, config: HunYuanConfig) -> Layout:
        if quantization_of(vars(config)) is None:
            raise CheckpointError(
                f"quantization={self.name!r} needs an FP8 checkpoint, and this one is not quantised: make one with "
                "hunyuan-vllm quantize SOURCE DESTINATION --scheme fp8"
            )
        return static_fp8(self.ignored).layout(config)

    def load(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        if name.endswith("_scale"):
            tensor = _checked_scale(name, tensor)
        elif is_quantised(name):
            self._check_weight(name, tensor)
        if cache_scale(name):
            self.cache_scales.keep(name, tensor.item())  # `cla_cache.py` takes it from there
        elif match := _EXPERT_INPUT_SCALE.match(name):
            yield from self._max_input_scale(match[1], tensor)
        else:
            yield name, tensor

    def _max_input_scale(self, expert: str, scale: Tensor) -> Iterable[tuple[str, Tensor]]:
        """The greater of an expert's gate's and up's, once both are there: they have one input, and vLLM has one place
        for both scales, where the last one read would stay."""
        if expert not in self._input_scales:
            self._input_scales[expert] = scale
        else:
            yield f"{expert}.gate_proj.input_scale", torch.maximum(scale, self._input_scales.pop(expert))

    def _check_weight(self, name: str, weight: Tensor) -> None:
        promised = name.removesuffix(".weight") not in self.ignored
        if promised != (weight.dtype == E4M3):
            raise CheckpointError(
                f"tensor {name!r} is {str(weight.dtype).removeprefix('torch.')}, and config.json says that it is "
                f"{E4M3_NAME if promised else 'unquantised'}: correct quantization_config's ignored_layers"
            )

    # Between the two.

    @cached_property
    def upstream(self) -> Fp8Config:
        """vLLM's own config for the same quantisation, which its methods ask."""
        from vllm.model_executor.layers.quantization.fp8 import Fp8Config

        return Fp8Config(activation_scheme="static")

    def _say_how_cpus_compute(self) -> None:
        if current_platform.is_cpu():
            logger.info_once(
                "FP8 on a CPU: weights are expanded to the model's type once, and activations are rounded as GPUs "
                "round them. This shows a GPU's numbers; it saves no memory (int8 does: hunyuan_int8)"
            )


def _checked_scale(name: str, scale: Tensor) -> Tensor:
    """float32 `[]`."""
    value = scale.item()
    if not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"checkpoint tensor {name!r} is {value:g}: a scale is a positive number")
    return scale.float()
