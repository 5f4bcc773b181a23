"""What a conversion needs of memory and disk, computed from the config"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import expected_tensors
from hunyuan_vllm.quantize.calibrate import SAMPLE
from hunyuan_vllm.quantize.formats import FORMATS, specs_of
from hunyuan_vllm.quantize.source import units
from hunyuan_vllm.quantize.writer import plan_shards
from hunyuan_vllm.util.text import gigabytes, plural

if TYPE_CHECKING:
    from hunyuan_vllm.quantize.convert import Options

WORKSPACE = 550 * 10**6  # bytes: Python and PyTorch
THREAD = 25 * 10**6  # and for each thread: float32 copies of a few rows, and what the allocator keeps of them


def state_bytes(config: HunYuanConfig, tokens: int) -> int:
    """Bytes that calibration keeps on the disk until the end, the replaced activations counted twice."""
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    total = 2 * tokens * (hidden + 2 * kv) * 4
    for layer in range(config.num_hidden_layers):
        mlps = config.experts_at(layer) + bool(config.shared_experts_at(layer))
        width = max(config.intermediate_at(layer), config.shared_width_at(layer))
        channels = 2 * hidden + mlps * (hidden + width)
        total += channels * (SAMPLE * 4 + 3 * 4)
    return total


@dataclass(frozen=True)
class Plan:
    """A conversion on paper; sizes in bytes."""

    parameters: int
    source_bytes: int
    written_bytes: int
    state_bytes: int
    files: int
    memory_calibrating: int
    memory_converting: int

    @classmethod
    def of(cls, config: HunYuanConfig, options: Options) -> Plan:
        shapes = expected_tensors(config)
        scheme = FORMATS[options.scheme]
        all_units = list(units(config))
        shards = plan_shards(
            ((unit, specs_of(unit, scheme, shapes, _dtype)) for unit in all_units), options.shard_bytes
        )
        sizes = {name: math.prod(shape) * _dtype(name).itemsize for name, shape in shapes.items()}
        quantised = [sum(sizes[name] for name in unit.names) for unit in all_units if unit.quantised]
        tokens = options.calibration_tokens if options.calibrates else 0
        # Smoothed weights are copies; the others are mapped files.
        largest_unit, largest = max(quantised), max(sizes.values())
        encoded = largest_unit // 2 if options.smooth is None else largest_unit * 2
        workspace = WORKSPACE + THREAD * torch.get_num_threads()
        return cls(
            parameters=sum(map(math.prod, shapes.values())),
            source_bytes=sum(sizes.values()),
            written_bytes=sum(shard.nbytes for shard in shards),
            state_bytes=state_bytes(config, tokens) if tokens else 0,
            files=len(shards),
            memory_calibrating=workspace + largest + activation_bytes(config, tokens) if tokens else 0,
            memory_converting=workspace + max(largest, largest_unit + encoded),
        )

    def lines(self) -> list[str]:
        memory, extra = [f"converting {gigabytes(self.memory_converting)}"], ""
        if self.state_bytes:
            memory.insert(0, f"calibrating {gigabytes(self.memory_calibrating)}")
            extra = f"; {gigabytes(self.state_bytes)} more until it is done"
        return [
            f"reads   {gigabytes(self.source_bytes)} ({self.parameters / 1e9:,.2f} billion parameters)",
            f"writes  {gigabytes(self.written_bytes)}, in {plural(self.files, 'file')}{extra}",
            f"memory  {gigabytes(self.memory)} ({', '.join(memory)})",
        ]

    @property
    def memory(self) -> int:
        return max(self.memory_calibrating, self.memory_converting)


def activation_bytes(config: HunYuanConfig, tokens: int) -> int:
    """Most bytes of activations while a layer runs, in bfloat16 (norms work in float32)."""
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layers = range(config.num_hidden_layers)
    width = max(max(config.intermediate_at(n), config.shared_width_at(n)) for n in layers)
    attention = 2 * hidden + 6 * queries + 4 * kv
    mlp = 6 * hidden + 3 * width
    norm = 8 * hidden
    return 2 * tokens * (2 * kv + max(attention, mlp, norm))


def _dtype(name: str) -> torch.dtype:
    """A published checkpoint's: the router is kept in float32."""
    return torch.float32 if name.endswith(".gate.wg.weight") else torch.bfloat16
