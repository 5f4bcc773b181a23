"""A conversion from start to end: check everything, calibrate, write file by file, read back, report, rename."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from torch import Tensor

from hunyuan_vllm.layout import expected_tensors
from hunyuan_vllm.network import Network
from hunyuan_vllm.quant.schemes import WRITTEN, find_scheme
from hunyuan_vllm.quantize.calibrate import SAMPLE, ActivationScales, Calibration, static_scales
from hunyuan_vllm.quantize.formats import FORMATS, specs_of
from hunyuan_vllm.quantize.smooth import SmoothQuant
from hunyuan_vllm.quantize.source import Source, Unit, kept_linears, place, units
from hunyuan_vllm.quantize.texts import Tokens, calibration_tokens
from hunyuan_vllm.quantize.verify import measure
from hunyuan_vllm.quantize.writer import Shard, Workspace, check_bits, plan_shards, reading_back
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.progress import Progress
from hunyuan_vllm.util.text import gigabytes, plural

REPORT = "quantize_report.json"


@dataclass(frozen=True)
class Options:
    """A conversion's options, beside its source and target.

    Attributes:
        smooth: SmoothQuant's α, from 0 (all difficulty stays in the activations) to 1; None for no smoothing.
        headroom: how many times what calibration saw at most the static input and V scales reach. E4M3 rounds large and
            small numbers alike, so room costs nothing, whereas what lies beyond the range is cut off.
        shard_bytes: most bytes of a file, unless a tensor is larger.
    """

    scheme: str
    smooth: float | None = None
    calibration_tokens: int = 8192
    headroom: float = 2.0
    shard_bytes: int = 5 * 10**9
    device: str = "cpu"

    @property
    def calibrates(self) -> bool:
        """Whether activations have to be seen before a weight can be written."""
        return self.scheme == "fp8" or self.smooth is not None


def quantize_checkpoint(
    src: Path,
    dst: Path,
    scheme: str,
    *,
    calibration: Path | Sequence[Sequence[int]] | None = None,
    console: Console | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Convert the BF16 checkpoint in `src` to `scheme`, in `dst`, which must not exist; returns the error report.

    A run that was killed continues where it stopped when it is started again with the same arguments.

    Args:
        calibration: a text file or a JSONL file of chats, or documents as token ids; None for the built-in text.
        console: where progress is shown; None for silence.
        options: fields of `Options`.
    """
    chosen = Options(find_scheme(scheme, WRITTEN).name, **options)
    progress = Progress(console or Console(quiet=True))
    return Conversion(Source(src), dst.absolute(), chosen, calibration, progress).run()


class Conversion:
    """One run of the command; arguments as `quantize_checkpoint` has them."""

    def __init__(
        self,
        source: Source,
        target: Path,
        options: Options,
        calibration: Path | Sequence[Sequence[int]] | None,
        progress: Progress,
    ) -> None:
        self._source, self._target, self._options, self._progress = source, target, options, progress
        self._format = FORMATS[options.scheme]
        self._format.check(source.config)
        if options.smooth is not None and torch.float16 in map(source.dtype, source.shapes):
            raise UserError("--smooth: float16 weights have too small a range for it; give the BF16 checkpoint")
        all_units = units(source.config)
        specs = partial(specs_of, weight_format=self._format, shapes=source.shapes, dtype=source.dtype)
        self._shards = plan_shards(((unit, specs(unit)) for unit in all_units), options.shard_bytes)
        self._calibration_given = calibration
        self._smooth: SmoothQuant | None = None
        self._activations: ActivationScales | None = None
        self._calibration: Calibration | None = None

    def run(self) -> dict[str, Any]:
        """Convert; returns the report."""
        source, options, tokens = self._source, self._options, None
        if options.calibrates:
            tokens = calibration_tokens(
                source.directory, source.config.vocab_size, self._calibration_given, options.calibration_tokens
            )
        with Workspace(self._target, self._record(tokens)) as workspace:
            state = state_bytes(source.config, tokens.ids.numel()) - workspace.state_bytes() if tokens else 0
            workspace.need_room(source, self._shards, state, "the conversion", "a DST")
            if workspace.resumed:
                self._progress.say(f"continuing with the finished files in {workspace.directory}")
            size = gigabytes(sum(map(source.nbytes, source.shapes)))
            text = f", calibrated on {tokens.ids.numel():,} tokens" if tokens else ""
            self._progress.say(f"{options.scheme}: {size} in {len(source.shapes):,} tensors{text}")
            if tokens is not None:
                self._calibrate(workspace, tokens)
            verify = partial(self._verify, workspace)
            workspace.write_checkpoint(source, self._shards, self._encoded, verify, self._progress, "quantising")
            files = [workspace.state / f"{shard.file}.json" for shard in self._shards]
            measured = (one for file in files for one in json.loads(file.read_text()))
            projections = sorted(measured, key=lambda one: place(one["projection"])[0])
            made = {**self._facts(tokens), "projections": projections}
            scheme = self._format.config(kept_linears(source.config))
            workspace.write_json(workspace.checkpoint / "config.json", {**source.json, "quantization_config": scheme})
            workspace.write_json(workspace.checkpoint / REPORT, made)
            workspace.finish()
        return made

    def _record(self, tokens: Tokens | None) -> dict[str, Any]:
        """What a run that goes on with another's work must have in common with it."""
        options = self._options
        return {
            "an SRC of contents": self._source.fingerprint()[:12],
            "--scheme": options.scheme,
            "--smooth": options.smooth,
            "--headroom": options.headroom,
            "shards of bytes": options.shard_bytes,
            "calibration tokens": tokens and f"{tokens.ids.numel()} (contents {tokens.digest()[:12]})",
        }

    def _calibrate(self, workspace: Workspace, tokens: Tokens) -> None:
        config = self._source.config
        self._calibration = calibration = Calibration(self._source, workspace)
        calibration.run(tokens, self._options.device, self._progress)
        if self._options.smooth is not None:
            self._smooth = SmoothQuant(config, self._options.smooth, calibration.layer)
        self._activations = ActivationScales(config, calibration.layer, self._smooth, self._options.headroom)

    def _read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        return self._smooth.apply(name, tensor) if self._smooth else tensor

    def _encoded(self, unit: Unit) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) as `specs_of` says."""
        if not unit.quantised:
            yield from ((name, self._read(name)) for name in unit.names)
            return
        weights = [self._read(name).to(self._options.device) for name in unit.names]
        for name, stored in zip(unit.names, self._format.encode(weights), strict=True):
            projection = name.removesuffix(".weight")
            for part, tensor in stored.items():
                yield f"{projection}.{part}", tensor
        if self._format.static_inputs:
            assert self._activations is not None
            yield from static_scales(unit, self._activations)

    def _verify(self, workspace: Workspace, file: Path, shard: Shard, verified: Callable[[Unit], None]) -> None:
        """Compare a file with what it was made from, and keep the errors of its projections."""
        measured = []
        parts: dict[str, list[str]] = {}
        for spec in shard.specs:
            parts.setdefault(spec.name.rpartition(".")[0], []).append(spec.name)
        with reading_back(file, shard, self._options.device) as tensors:
            for unit in shard.units:
                exact = [] if unit.quantised else [(name, self._read(name)) for name in unit.names]
                if unit.quantised and self._format.static_inputs and self._activations:
                    exact += static_scales(unit, self._activations)
                for name, wanted in exact:
                    check_bits(file, name, tensors.get_tensor(name).cpu(), wanted)
                for name in unit.names if unit.quantised else ():
                    keys = parts[name.removesuffix(".weight")]
                    stored = {key.rpartition(".")[2]: tensors.get_tensor(key) for key in keys}
                    weight = self._read(name).to(self._options.device)
                    measured.append(asdict(measure(self._format, name, weight, stored, self._activations)))
                verified(unit)
        workspace.write_json(workspace.state / f"{shard.file}.json", measured)

    def _facts(self, tokens: Tokens | None) -> dict[str, Any]:
        source, options = self._source, self._options
        facts: dict[str, Any] = {
            "scheme": options.scheme,
            "source": source.directory.resolve().name,
            "smooth": options.smooth,
            "headroom": options.headroom if self._format.static_inputs else None,
            "source_bytes": sum(map(source.nbytes, source.shapes)),
            "written_bytes": sum(shard.nbytes for shard in self._shards),
            "calibration": None,
        }
        if tokens is not None and self._calibration is not None:
            given = self._calibration_given
            text = "built-in text" if given is None else given.name if isinstance(given, Path) else "token ids"
            idle = self._calibration.idle_experts()
            facts["calibration"] = {"text": text, "tokens": tokens.ids.numel(), "idle_experts": idle}
        return facts


WORKSPACE = 550 * 10**6  # bytes: Python and PyTorch
THREAD = 25 * 10**6  # and for each thread: float32 copies of a few rows, and what the allocator keeps of them


def state_bytes(config: Network, tokens: int) -> int:
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
    def of(cls, config: Network, options: Options) -> Self:
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


def activation_bytes(config: Network, tokens: int) -> int:
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
