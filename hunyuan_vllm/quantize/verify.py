"""The written checkpoint read back and compared, and the report of the errors"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hunyuan_vllm.quantize.calibrate import ActivationScales, static_scales
from hunyuan_vllm.quantize.formats import WeightFormat, in_blocks
from hunyuan_vllm.quantize.source import Unit, place
from hunyuan_vllm.quantize.writer import REMEDY, Shard, check_bits, reading_back
from hunyuan_vllm.util.errors import UserError

KINDS = {".self_attn.": "attention", ".shared_mlp.": "shared MLP", ".experts.": "experts", ".mlp.": "dense MLP"}


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print a row for each kind of projection: mean errors, and the largest with the projection that has it."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for one in report["projections"]:
        kinds.setdefault(next(kind for mark, kind in KINDS.items() if mark in one["projection"]), []).append(one)
    table = Table(title=f"{report['scheme']}: relative errors", title_justify="left")
    for title in ("", "weights", "outputs", "outlier channels", "largest", "of"):
        table.add_column(title, justify="left" if title in ("", "of") else "right")
    for kind, ones in kinds.items():
        key, outputs, outliers = "relative_error", "", ""
        if ones[0]["output_error"] is not None:  # it was calibrated
            key = "output_error"
            outputs = _percent(fmean(one["output_error"] for one in ones))
            outliers = str(sum(len(one["outliers"]) for one in ones))
        worst = max(ones, key=lambda one: one[key])
        weights = _percent(fmean(one["relative_error"] for one in ones))
        table.add_row(kind, weights, outputs, outliers, _percent(worst[key]), worst["projection"])
    console.print(table)


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share else "0"


OUTLIER = 10  # times the median channel's largest input


@dataclass(frozen=True)
class Measured:
    """What quantising did to one projection.

    Attributes:
        relative_error: ‖Ŵ − W‖ / ‖W‖, Frobenius.
        input_scale: the static one, where the scheme has it.
        output_error: ‖x̂Ŵᵀ − xWᵀ‖ / ‖xWᵀ‖ over calibration inputs, rounded as the engine rounds them.
        outliers: input channels whose largest input is more than ten times the median channel's → how many times.
    """

    projection: str
    relative_error: float
    input_scale: float | None = None
    output_error: float | None = None
    outliers: dict[int, float] = field(default_factory=dict)


class Verifier:
    """Compares written files with what they were made from.

    Args:
        read: a canonical tensor as it is to be represented: the checkpoint's, after smoothing.
    """

    def __init__(
        self,
        weight_format: WeightFormat,
        read: Callable[[str], Tensor],
        activations: ActivationScales | None,
        device: str,
    ) -> None:
        self._format, self._read, self._activations, self._device = weight_format, read, activations, device

    def check(self, file: Path, shard: Shard, verified: Callable[[Unit], None]) -> list[Measured]:
        """Measure every projection in `file`; `verified` is told of each unit."""
        measured = []
        parts: dict[str, list[str]] = {}
        for spec in shard.specs:
            parts.setdefault(spec.name.rpartition(".")[0], []).append(spec.name)
        with reading_back(file, shard, self._device) as tensors:
            for unit in shard.units:
                for name, wanted in self._kept(unit):
                    check_bits(file, name, tensors.get_tensor(name).cpu(), wanted)
                for name in unit.names if unit.quantised else ():
                    projection = name.removesuffix(".weight")
                    stored = {key.rpartition(".")[2]: tensors.get_tensor(key) for key in parts[projection]}
                    measured.append(self._measure(file, projection, stored))
                verified(unit)
        return measured

    def _kept(self, unit: Unit) -> Iterable[tuple[str, Tensor]]:
        """What of a unit must read back to the bit."""
        if not unit.quantised:
            return [(name, self._read(name)) for name in unit.names]
        if not self._format.static_inputs:
            return []
        assert self._activations is not None
        return static_scales(unit, self._activations)

    def _measure(self, file: Path, projection: str, stored: dict[str, Tensor]) -> Measured:
        weight = self._read(f"{projection}.weight").to(self._device)
        inputs = None
        if self._activations is not None:
            inputs = self._activations.sample(*place(projection)).to(self._device)
        found = compare(self._format, weight, stored, inputs)
        if found.wrong:
            raise UserError(f"{file}: {found.wrong} weights of {projection} read back differently: {REMEDY}")
        measured = Measured(projection, _ratio(found.weight_error, found.weight))
        if self._activations is None:
            return measured
        amax = self._activations.amax(*place(projection))
        times = amax / amax.median().clamp(min=torch.finfo(torch.float32).tiny)
        return replace(
            measured,
            input_scale=float(stored["input_scale"]) if self._format.static_inputs else None,
            output_error=_ratio(found.output_error, found.output),
            outliers={int(n): round(float(times[n]), 1) for n in (times > OUTLIER).nonzero()[:, 0]},
        )


class Comparison(NamedTuple):
    """A weight and what is stored for it: how many weights are wrong, and sums of squares of weights, of outputs and of
    the differences in both."""

    wrong: int
    weight: float
    weight_error: float
    output: float
    output_error: float


def compare(
    weight_format: WeightFormat, weight: Tensor, stored: Mapping[str, Tensor], inputs: Tensor | None = None
) -> Comparison:
    """Compare `weight [out, in]` with the tensors that stand for it, and its outputs for `inputs [tokens, in]`."""
    served = None if inputs is None else weight_format.as_served(inputs, stored)

    def block(rows: slice) -> Comparison:
        exact = weight[rows].float()
        part = {key: tensor[rows] if tensor.dim() == 2 else tensor for key, tensor in stored.items()}
        decoded = weight_format.decode(part)
        difference = decoded - exact
        allowed = weight_format.half_step(exact, part) * (1 + 1e-5)  # float32 rounds too
        wrong = int((~(difference.abs() <= allowed)).sum())  # NaN too
        output = output_error = 0.0
        if inputs is not None and served is not None:
            outputs = inputs @ exact.T
            output, output_error = _square(outputs), _square(served @ decoded.T - outputs)
        return Comparison(wrong, _square(exact), _square(difference), output, output_error)

    return Comparison(*map(sum, zip(*in_blocks(weight, block), strict=True)))


def _square(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix)) ** 2


def _ratio(error: float, whole: float) -> float:
    """Of two sums of squares, as norms; a tensor of zeros has no error."""
    return math.sqrt(error / whole) if whole else 0.0
