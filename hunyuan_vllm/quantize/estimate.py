"""What a conversion needs, on paper: from the config, and from how fast this machine does a small part of the work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import expected_tensors
from hunyuan_vllm.quantize.calibrate import SAMPLE
from hunyuan_vllm.quantize.encode import specs_of
from hunyuan_vllm.quantize.formats import scheme_named
from hunyuan_vllm.quantize.options import Options
from hunyuan_vllm.quantize.units import units
from hunyuan_vllm.quantize.verify import compare
from hunyuan_vllm.quantize.writer import plan_shards
from hunyuan_vllm.util.text import duration, gigabytes

PROBE = 4096  # a square weight of this size stands for the others
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
class Rates:
    """How fast this machine is.

    Attributes:
        look: bytes a second of weights whose ranges are taken.
        multiply: floating-point operations a second of a matrix product in bfloat16.
        convert: bytes a second of weights, rounded and compared with the result.
    """

    look: float
    multiply: float
    convert: float


@dataclass(frozen=True)
class Plan:
    """A conversion on paper. Sizes in bytes, times in seconds; reading and writing files comes on top where the disk
    is slower than `disk_rate`."""

    parameters: int
    source_bytes: int
    written_bytes: int
    state_bytes: int
    files: int
    memory_calibrating: int
    memory_converting: int
    seconds_calibrating: float
    seconds_converting: float

    @classmethod
    def of(cls, config: HunYuanConfig, options: Options, rates: Rates) -> Plan:
        shapes = expected_tensors(config)
        scheme = scheme_named(options.scheme)
        all_units = list(units(config))
        shards = plan_shards(
            ((unit, specs_of(unit, scheme, shapes, _dtype)) for unit in all_units), options.shard_bytes
        )
        sizes = {name: math.prod(shape) * _dtype(name).itemsize for name, shape in shapes.items()}
        quantised = [sum(sizes[name] for name in unit.names) for unit in all_units if unit.quantised]
        tokens = options.calibration_tokens if options.calibrates else 0
        # Read for ranges, multiplied, read for conversion. Migrated weights are copies; the others are mapped files.
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
            seconds_calibrating=tokens
            and 2 * tokens * active_parameters(config) / rates.multiply + sum(quantised) / rates.look,
            seconds_converting=sum(quantised) / rates.convert,
        )

    def lines(self, rates: Rates, device: str) -> list[str]:
        """What to tell a user."""
        memory = [f"converting {gigabytes(self.memory_converting)}"]
        hours = [f"converting {duration(self.seconds_converting)}"]
        extra = ""
        if self.seconds_calibrating:
            memory.insert(0, f"calibrating {gigabytes(self.memory_calibrating)}")
            hours.insert(0, f"calibrating {duration(self.seconds_calibrating)}")
            extra = f"; {gigabytes(self.state_bytes)} more until it is done"
        return [
            f"reads   {gigabytes(self.source_bytes)} ({self.parameters / 1e9:,.2f} billion parameters)",
            f"writes  {gigabytes(self.written_bytes)}, in {self.files} files{extra}",
            f"memory  {gigabytes(self.memory)} ({', '.join(memory)})",
            f"time    {duration(self.seconds)} ({', '.join(hours)}), h:mm:ss; longer if the disk reads and writes less "
            f"than {gigabytes(self.disk_rate)}/s",
            f"        at the rates just measured on {device}: ranges {gigabytes(rates.look)}/s, products "
            f"{rates.multiply / 1e12:.2g} TFLOP/s, converting {gigabytes(rates.convert)}/s",
        ]

    @property
    def memory(self) -> int:
        return max(self.memory_calibrating, self.memory_converting)

    @property
    def seconds(self) -> float:
        return self.seconds_calibrating + self.seconds_converting

    @property
    def disk_rate(self) -> float:
        """Bytes a second of reading and writing that keep up with the arithmetic."""
        passes = 3 if self.seconds_calibrating else 2
        return (passes * self.source_bytes + 2 * self.written_bytes) / self.seconds


def active_parameters(config: HunYuanConfig) -> int:
    """Weights a token is multiplied with in the decoder layers."""
    total = 0
    for name, shape in expected_tensors(config).items():
        if name.endswith("_proj.weight"):
            layer = int(name.split(".")[2])
            share = config.topk_at(layer) / config.experts_at(layer) if ".experts." in name else 1.0
            total += round(math.prod(shape) * share)
    return total


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


def measure_rates(options: Options) -> Rates:
    """Time the parts of the work on one random weight; about two seconds."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(PROBE, PROBE, generator=generator).bfloat16().to(options.device)
    tokens = min(2048, options.calibration_tokens)
    inputs = torch.randn(tokens, PROBE, generator=generator).bfloat16().to(options.device)
    factors = torch.ones_like(weight[0])
    scheme = scheme_named(options.scheme)

    def look() -> None:
        weight.aminmax()
        torch.maximum(-weight.amin(dim=0), weight.amax(dim=0)).cpu()

    def convert() -> None:
        weight.clone()  # out of the file
        if options.smooth is not None:
            for _ in range(2):  # to convert, and to compare
                torch.mul(weight, factors)
        (stored,) = scheme.encode([weight], options.clip)
        compare(scheme, weight, stored)
        weight.clone()  # into the file, and out of it again

    return Rates(
        look=weight.nbytes / _seconds(look, options.device),
        multiply=2 * weight.numel() * tokens / _seconds(lambda: F.linear(inputs, weight), options.device),
        convert=weight.nbytes / _seconds(convert, options.device),
    )


def _seconds(work: Callable[[], object], device: str) -> float:
    """The faster of two runs after a first."""
    times = []
    for _ in range(3):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _dtype(name: str) -> torch.dtype:
    """A published checkpoint's: the router is kept in float32."""
    return torch.float32 if name.endswith(".gate.wg.weight") else torch.bfloat16
