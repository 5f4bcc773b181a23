"""Stream a checkpoint into the vLLM model: check each tensor, split what is fused, show the progress"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_world_group,
)
from vllm.logger import init_logger
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, is_pp_missing_parameter

from hunyuan_vllm.attention import FoldedQueryNorm
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import FUSED, CheckpointError, Layout
from hunyuan_vllm.quant.base import HunYuanQuantization, loaded_layout
from hunyuan_vllm.quant.layouts import is_quantised
from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import duration, some

if TYPE_CHECKING:
    from hunyuan_vllm.model import HunYuanForCausalLM

QUIET = 3.0  # seconds that a load must take to be summed up
LINE_EVERY = 10.0  # seconds

logger = init_logger(f"vllm.{__name__}")

Named = tuple[str, Tensor]


class LoadProgress(Progress):
    """Counts tensors as they pass through `reading` and `quantised`, and shows it.

    Args:
        shown: this process reports.
        bar: show a bar if standard error is a terminal.
    """

    def __init__(self, layout: Layout, *, shown: bool, bar: bool = True) -> None:
        terminal = None if shown and bar else False
        super().__init__(Console(stderr=True, force_terminal=terminal), LINE_EVERY)
        self._expected, self._shown = layout.expected, shown
        self._count = self._bytes_read = self._bytes_quantised = 0

    def say(self, text: str) -> None:
        if self._shown:
            logger.info(text)

    def reading(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """Pass on what the checkpoint holds; the next is asked for when the last has been loaded."""
        started = time.monotonic()
        with self.stage("Loading weights", sum(map(math.prod, self._expected.values())), unit=None):
            for name, tensor in tensors:
                yield name, tensor
                if name in self._expected:
                    self._count += 1
                    self._bytes_read += tensor.nbytes
                    self.advance(tensor.numel(), self._amounts())
        if (seconds := time.monotonic() - started) >= QUIET:
            self.say(f"Loaded {self._amounts()} in {duration(seconds)}")

    def quantised(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """Pass on what a checkpoint's tensor was quantised to."""
        for name, tensor in tensors:
            self._bytes_quantised += tensor.nbytes
            yield name, tensor

    def _amounts(self) -> str:
        quantised = f", {self._bytes_quantised / 1e9:.1f} GB quantised" if self._bytes_quantised else ""
        return f"{self._count:,} of {len(self._expected):,} tensors, {self._bytes_read / 1e9:.1f} GB read{quantised}"


# Checkpoint name → this package's module name. An owner's q_proj is added by `_names_for`.
_STACKED: dict = {
    **{f".{part}": (".qkv_proj", part[0]) for part in FUSED["qkv_proj"][1:]},
    **{
        f"{mlp}.{part}": (f"{mlp}.gate_up_proj", shard)
        for mlp in (".shared_mlp", ".mlp")
        for shard, part in enumerate(FUSED["gate_up_proj"])
    },
}
CHECKPOINT_NAMES = WeightsMapper(
    orig_to_new_substr={
        ".mlp.gate.wg.": ".mlp.gate.",
        ".query_layernorm.weight": ".qk_norm.query_weight",
        ".key_layernorm.weight": ".qk_norm.key_weight",
    },
    orig_to_new_stacked=_STACKED,
)


def load_checkpoint(model: HunYuanForCausalLM, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Load (name, tensor) pairs in any order; returns the names of the parameters that were filled.

    The first load must be complete, except into a model that began with dummy weights (weights then arrive in parts);
    later ones may hold any part of the network.

    Raises:
        CheckpointError: a tensor is unknown, misshapen, not finite, there twice, or missing; the message names it.
    """
    scheme = model.quant_config if isinstance(model.quant_config, HunYuanQuantization) else None
    layout = loaded_layout(model.quant_config, model.config)
    seen: set[str] = set()
    use_bar = model.vllm_config.load_config.use_tqdm_on_load
    progress = LoadProgress(layout, shown=get_world_group().rank_in_group == 0, bar=use_bar)
    tensors = progress.reading(_checked(model, layout, weights, seen))
    if scheme:
        tensors = _converted(model, scheme, tensors, progress)
    loader = AutoWeightsLoader(model)
    with _refusals_explained(model):
        loaded = loader.load_weights(tensors, mapper=_names_for(model.config))
    if model.expects_whole_checkpoint:
        _require_all(model, layout, seen)
        model.expects_whole_checkpoint = False
    for module in model.modules():
        if isinstance(module, FoldedQueryNorm):
            module.fold()
    return loaded


@contextmanager
def _refusals_explained(model: HunYuanForCausalLM) -> Iterator[None]:
    """A quantisation of vLLM's own may take another view of which layers are quantised than the file shows."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, AttributeError) as error:
        if model.quant_config is None or isinstance(model.quant_config, HunYuanQuantization):
            raise
        reason = str(error).partition(". The available")[0]
        raise CheckpointError(
            f"vLLM's quantisation {model.quant_config.get_name()} does not load the checkpoint as it is: {reason}. "
            "Correct which layers quantization_config leaves unquantised"
        ) from error


def _names_for(config: HunYuanConfig) -> WeightsMapper:
    """An owner's q_proj is a shard of its fused projection; a cross layer's stands alone."""
    owners = [layer for layer in range(config.num_hidden_layers) if not config.is_cross(layer)]
    q_proj: dict = {
        f".layers.{layer}.self_attn.q_proj": (f".layers.{layer}.self_attn.qkv_proj", "q") for layer in owners
    }
    return replace(CHECKPOINT_NAMES, orig_to_new_stacked=_STACKED | q_proj)


def _checked(
    model: HunYuanForCausalLM, layout: Layout, weights: Iterable[tuple[str, torch.Tensor]], seen: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    for name, tensor in weights:
        parts = layout.split(name, tensor)
        if parts:
            _check_finite(name, tensor, rank, ranks)
        for part, value in parts:
            if part in seen:
                raise CheckpointError(f"checkpoint tensor {part!r} occurs twice (again as {name!r})")
            seen.add(part)
            yield part, _once_among_ranks(model, part, value, rank)


def _converted(
    model: HunYuanForCausalLM,
    scheme: HunYuanQuantization,
    tensors: Iterable[tuple[str, torch.Tensor]],
    progress: LoadProgress,
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        if is_pp_missing_parameter(name, model):  # another pipeline stage's: the loader drops it
            yield name, tensor
            continue
        converted = scheme.load(name, tensor)
        quantises = is_quantised(name) and tensor.itemsize > 1
        yield from progress.quantised(converted) if quantises else converted


def _once_among_ranks(model: HunYuanForCausalLM, name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """Ranks, of all replicas, add up their parts of an expert's output, its bias included: only the first brings it."""
    parallel = model.vllm_config.parallel_config
    if parallel.enable_expert_parallel or (rank, parallel.data_parallel_rank) == (0, 0):
        return tensor
    return torch.zeros_like(tensor) if name.endswith(".down_proj.bias") and ".experts." in name else tensor


def _check_finite(name: str, tensor: torch.Tensor, rank: int, ranks: int) -> None:
    """Each rank looks at its share of the elements: in all, the file is read once."""
    share = tensor.flatten().tensor_split(ranks)[rank]
    if not share.numel():
        return
    if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16):
        finite = all(map(math.isfinite, share.aminmax()))  # NaN is both minimum and maximum
    elif tensor.dtype == torch.float8_e4m3fn:
        finite = bool(share.view(torch.int8).bitwise_and(0x7F).amax() < 0x7F)  # that is its NaN; it has no infinity
    else:
        return
    if not finite:
        raise CheckpointError(f"checkpoint tensor {name!r} holds NaN or infinite values")


def _require_all(model: HunYuanForCausalLM, layout: Layout, seen: set[str]) -> None:
    missing = layout.missing(seen)
    parallel = model.vllm_config.parallel_config
    if parallel.enable_expert_parallel:  # vLLM may skip the experts of other ranks while reading
        missing = [name for name in missing if ".experts." not in name]
    if missing:
        raise CheckpointError(f"the checkpoint lacks tensor {some([repr(name) for name in missing], limit=1)}")
