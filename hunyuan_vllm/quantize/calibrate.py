"""Calibration: the network run layer by layer over texts, what is recorded of its activations, and their FP8 scales"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.quant.rounding import E4M3_MAX
from hunyuan_vllm.quantize.source import Source, Unit, input_of, place
from hunyuan_vllm.quantize.texts import Tokens
from hunyuan_vllm.quantize.writer import Workspace
from hunyuan_vllm.reference import DecoderLayer, MoE, rotation
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.progress import Progress

if TYPE_CHECKING:
    from hunyuan_vllm.quantize.smooth import SmoothQuant

SAMPLE = 16  # inputs kept of every projection, to measure what quantising it does to its outputs
ENOUGH = 64  # tokens an expert has to see; below that it is shown those that come closest to being routed to it


@dataclass
class LayerStats:
    """What calibration learnt of one layer. Keys are projections within the layer, as `mlp.experts.3.gate_proj`.

    k_proj and v_proj have the inputs of q_proj, and up_proj those of gate_proj: these are kept once.

    Attributes:
        inputs: largest magnitude of each input channel, float32 `[in]`.
        columns: largest magnitude of each column of the weight, float32 `[in]`.
        samples: some inputs, `[at most SAMPLE, in]`.
        routed: for experts, tokens that the router sent there; it may be shown more.
        k_amax: an owner's largest magnitude of K as a cache without qk-norm holds it, float32 `[]`.
        v_amax: an owner's largest magnitude of each channel of V, float32 `[kv_heads * head_dim]`.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)
    routed: dict[str, int] = field(default_factory=dict)
    k_amax: Tensor | None = None
    v_amax: Tensor | None = None

    def to_tensors(self) -> dict[str, Tensor]:
        """A flat form for a safetensors file."""
        kinds = ("inputs", "columns", "samples", "routed")
        flat = {
            f"{kind}/{name}": torch.as_tensor(value) for kind in kinds for name, value in getattr(self, kind).items()
        }
        if self.k_amax is not None and self.v_amax is not None:
            flat |= {"k_amax/": self.k_amax, "v_amax/": self.v_amax}
        return flat

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> LayerStats:
        stats = cls()
        for key, tensor in flat.items():
            kind, name = key.split("/", 1)
            if kind in ("k_amax", "v_amax"):
                setattr(stats, kind, tensor)
            else:
                getattr(stats, kind)[name] = int(tensor) if kind == "routed" else tensor
        return stats


class ObservedLayer:
    """A decoder layer of the plain model that holds one projection's weight at a time."""

    def __init__(
        self, config: HunYuanConfig, layer: int, read: Callable[[str], Tensor], device: torch.device | str
    ) -> None:
        self._prefix, self._device, self._read_tensor = f"model.layers.{layer}.", device, read
        self._owner = not config.is_cross(layer)
        self.stats = LayerStats()
        with torch.device("meta"):
            self._layer = DecoderLayer(config, layer).eval().requires_grad_(False)
        for name, module in self._layer.named_modules():
            if isinstance(module, nn.Linear) and name.endswith("_proj"):
                module.register_forward_pre_hook(self._load_and_see(name))
                module.register_forward_hook(_drop)
            else:
                self._load(module, name)
        if isinstance(self._layer.mlp, MoE):
            self._layer.mlp.register_forward_hook(self._show_idle_experts)

    @torch.inference_mode()
    def __call__(
        self, x: Tensor, k: Tensor | None, v: Tensor | None, cos: Tensor, sin: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's outputs, and the K and V of its group; arguments as the plain model's layer has them."""
        x, k, v, _ = self._layer(x, k, v, cos, sin, mask)
        if self._owner:
            self.stats.k_amax = k.abs().amax().float().cpu()
            self.stats.v_amax = v.abs().amax(dim=(0, 2)).flatten().float().cpu()  # [batch, kv_heads, tokens, head_dim]
        return x, k, v

    def _load(self, module: nn.Module, name: str) -> None:
        for part, _ in list(module.named_parameters(recurse=False)):
            tensor = self._read_tensor(f"{self._prefix}{name}.{part}").to(self._device)
            if name.endswith("gate.wg"):
                tensor = tensor.float()  # the router's, whatever the checkpoint keeps it in
            setattr(module, part, nn.Parameter(tensor, requires_grad=False))

    def _load_and_see(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        shares = _keeper(name) != name

        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._load(module, name)
            assert isinstance(module.weight, Tensor)
            if name not in self.stats.columns:
                self.stats.columns[name] = _amax_of_columns(module.weight)
            if not shares:
                self._see(name, arguments[0].flatten(0, -2))

        return hook

    def _see(self, name: str, inputs: Tensor) -> None:
        """`inputs` is `[tokens, in]`; an expert that the router and we show tokens sees some twice."""
        amax, stats = _amax_of_columns(inputs), self.stats
        stats.inputs[name] = torch.maximum(stats.inputs[name], amax) if name in stats.inputs else amax
        if name not in stats.samples:
            spread = torch.linspace(0, len(inputs) - 1, min(SAMPLE, len(inputs))).long()
            stats.samples[name] = inputs[spread.to(inputs.device)].cpu()

    def _show_idle_experts(self, moe: MoE, arguments: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor]) -> None:
        """An expert that saw little is shown the tokens with the greatest router logits for it: of all there are, the
        likeliest to be routed to it by another text."""
        tokens, logits = arguments[0].flatten(0, -2), outputs[1]
        routed = logits.topk(moe.topk, dim=-1).indices.flatten().bincount(minlength=len(moe.experts)).tolist()
        for number, (expert, count) in enumerate(zip(moe.experts, routed, strict=True)):
            self.stats.routed[f"mlp.experts.{number}"] = count
            if count < ENOUGH:
                likeliest = logits[:, number].topk(min(ENOUGH, len(tokens))).indices
                expert(tokens[likeliest])


def _drop(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
    for part, tensor in list(module.named_parameters(recurse=False)):
        setattr(module, part, nn.Parameter(tensor.to("meta"), requires_grad=False))


def _amax_of_columns(matrix: Tensor) -> Tensor:
    # aminmax along the first dimension is ten times as slow on CPUs.
    return torch.maximum(-matrix.amin(dim=0), matrix.amax(dim=0)).float().cpu()


STATE = "activations"


class Calibration:
    """What calibration learnt of each layer, kept in the workspace."""

    def __init__(self, source: Source, workspace: Workspace) -> None:
        self._source, self._workspace = source, workspace
        # Its group is what smoothing of a layer's V asks for.
        self.layer = lru_cache(maxsize=source.config.cla_share_factor + 1)(self._layer)

    def run(self, tokens: Tokens, device: str, progress: Progress) -> None:
        """Run the layers that no earlier run has."""
        config = self._source.config
        held = self._workspace.tensors(STATE)
        k: Tensor | None = None
        v: Tensor | None = None
        if held is None:
            x, first = self._source.read("model.embed_tokens.weight")[tokens.ids], 0
        else:
            x, k, v, first = held["x"], held["k"], held["v"], int(held["next"])
        if first == config.num_hidden_layers:
            return
        dtype = x.dtype
        cos, sin = rotation(config, tokens.positions, tokens.ids.shape[1], dtype)
        x, cos, sin, mask = (tensor.to(device) for tensor in (x, cos, sin, tokens.mask))
        k, v = (None if tensor is None else tensor.to(device) for tensor in (k, v))
        with progress.stage("calibrating", config.num_hidden_layers, first, unit="layers"):
            for number in range(first, config.num_hidden_layers):
                layer = ObservedLayer(config, number, lambda name: self._source.read(name).to(dtype), device)
                x, k, v = layer(x, k, v, cos, sin, mask)
                if not x.isfinite().all():
                    raise UserError(f"layer {number} makes NaN or infinite activations of the calibration text")
                self._workspace.write_tensors(f"layer-{number:04d}", layer.stats.to_tensors())
                after = {"x": x.cpu(), "k": k.cpu(), "v": v.cpu(), "next": torch.tensor(number + 1)}
                self._workspace.write_tensors(STATE, after)
                progress.advance(1)

    def idle_experts(self) -> list[dict[str, int]]:
        """Experts that the router sent too few tokens, and so were shown others: layer, expert, tokens routed."""
        return [
            {"layer": number, "expert": int(name.rpartition(".")[2]), "routed": routed}
            for number in range(self._source.config.num_hidden_layers)
            for name, routed in self.layer(number).routed.items()
            if routed < ENOUGH
        ]

    def _layer(self, number: int) -> LayerStats:
        tensors = self._workspace.tensors(f"layer-{number:04d}")
        assert tensors is not None
        return LayerStats.from_tensors(tensors)


class ActivationScales:
    """Static E4M3 scales: `headroom` times what calibration saw at most, after smoothing, becomes 448.

    All experts of a layer share the scale of their gate and up inputs, and that of their down inputs, as the engine's
    fused experts need it: loading then rescales nothing.
    """

    def __init__(
        self,
        config: HunYuanConfig,
        stats: Callable[[int], LayerStats],
        smoothing: SmoothQuant | None = None,
        headroom: float = 1.0,
    ) -> None:
        self._config, self._stats, self._smooth, self._headroom = config, stats, smoothing, headroom

    def amax(self, layer: int, projection: str) -> Tensor:
        """Largest magnitude of each input channel of a layer's projection, float32 `[in]`."""
        return self._smoothed(layer, projection, self._stats(layer).inputs[_keeper(projection)])

    def sample(self, layer: int, projection: str) -> Tensor:
        """Some inputs, float32 `[tokens, in]`."""
        return self._smoothed(layer, projection, self._stats(layer).samples[_keeper(projection)].float())

    def _smoothed(self, layer: int, projection: str, inputs: Tensor) -> Tensor:
        factors = self._smooth.inputs(layer, projection) if self._smooth else None
        return inputs if factors is None else inputs / factors

    def input_scale(self, layer: int, projection: str) -> Tensor:
        """float32 `[]`."""
        shared = input_of(projection)
        sharing = [name for name in self._stats(layer).inputs if input_of(name) == shared]
        return self._scale(max(float(self.amax(layer, name).max()) for name in sharing))

    def cache_scales(self, owner: int) -> tuple[Tensor, Tensor]:
        """An owner's K and V scale, float32 `[]`. With qk-norm the cache holds K / rms(K), which no channel can exceed
        sqrt(head_dim) of: that scale needs no calibration."""
        stats = self._stats(owner)
        assert stats.k_amax is not None and stats.v_amax is not None
        v_amax = stats.v_amax if self._smooth is None else stats.v_amax / self._smooth.value(owner)
        v_scale = self._scale(float(v_amax.max()))
        if self._config.use_qk_norm:
            return torch.tensor(math.sqrt(self._config.head_dim) / E4M3_MAX), v_scale
        return self._scale(float(stats.k_amax)), v_scale

    def _scale(self, amax: float) -> Tensor:
        return torch.tensor(self._headroom * amax / E4M3_MAX if amax > 0 else 1.0)


def _keeper(projection: str) -> str:
    """The projection under which the inputs of fused ones are kept."""
    for part, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
        if projection.endswith(part):
            return projection.removesuffix(part) + first
    return projection


def static_scales(unit: Unit, activations: ActivationScales) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the scales of a quantised unit that come from calibration."""
    for name in unit.names:
        projection = name.removesuffix(".weight")
        yield f"{projection}.input_scale", activations.input_scale(*place(projection))
    if owner := unit.owned_cache:
        k_scale, v_scale = activations.cache_scales(place(owner)[0])
        yield f"{owner}.k_scale", k_scale
        yield f"{owner}.v_scale", v_scale
