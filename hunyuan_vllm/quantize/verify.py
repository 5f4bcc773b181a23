"""The written checkpoint read back and compared, and the report of the errors"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hunyuan_vllm.quantize.calibrate import ActivationScales
from hunyuan_vllm.quantize.formats import WeightFormat, in_blocks
from hunyuan_vllm.quantize.source import place
from hunyuan_vllm.quantize.writer import REMEDY
from hunyuan_vllm.util.errors import UserError

KINDS = {".self_attn.": "attention", ".shared_mlp.": "shared MLP", ".experts.": "experts", ".mlp.": "dense MLP"}


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print a row for each kind of projection: mean errors, and the largest with the projection that has it."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for one in report["projections"]:
        kinds.setdefault(next(kind for mark, kind in KINDS.items() if mark in one["projection"]), []).append(one)
    calibrated = report["projections"][0]["output_error"] is not None
    key, more = ("output_error", ("outputs", "outlier channels")) if calibrated else ("relative_error", ())
    table = Table(title=f"{report['scheme']}: relative errors", title_justify="left")
    for title in ("", "weights", *more, "largest", "of"):
        table.add_column(title, justify="left" if title in ("", "of") else "right")
    for kind, ones in kinds.items():
        figures = [_percent(fmean(one["relative_error"] for one in ones))]
        if calibrated:
            outliers = sum(len(one["outliers"]) for one in ones)
            figures += [_percent(fmean(one["output_error"] for one in ones)), str(outliers)]
        worst = max(ones, key=lambda one: one[key])
        table.add_row(kind, *figures, _percent(worst[key]), worst["projection"])
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


def measure(
    weight_format: WeightFormat,
    name: str,
    weight: Tensor,
    stored: Mapping[str, Tensor],
    activations: ActivationScales | None,
) -> Measured:
    """Compare the tensors that stand for a weight with it, and its outputs for calibration inputs.

    Raises:
        UserError: a weight is further away than rounding moves it.
    """
    projection = name.removesuffix(".weight")
    inputs = activations.sample(*place(projection)).to(weight.device) if activations else None
    found = compare(weight_format, weight, stored, inputs)
    if found.wrong:
        raise UserError(f"{found.wrong} weights of {projection} read back differently: {REMEDY}")
    measured = Measured(projection, _ratio(found.weight_error, found.weight))
    if activations is None:
        return measured
    amax = activations.amax(*place(projection))
    times = amax / amax.median().clamp(min=torch.finfo(torch.float32).tiny)
    return replace(
        measured,
        input_scale=float(stored["input_scale"]) if weight_format.static_inputs else None,
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
